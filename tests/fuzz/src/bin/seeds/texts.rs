//! Seeds that are text.

/// Files of every key.
pub fn config() -> Vec<Vec<u8>> {
    let whole = r#"state = "/var/lib/bedplate"
disks = ["/mnt/a", "/mnt/b"]
mount = "/run/bedplate/mount"
socket = "/run/bedplate/bedplate.socket"
mount_mode = "0660"
allow_other = true
threads = 8
executor = "ring"
fuse_transport = "auto"
low_latency = false
image_jobs = 2
image_deadline = "12h"
base_cache = "shared"
log = "info,bedplate=debug"
log_format = "json"

[http]
connect_timeout = "8s"
idle_timeout = "1m30s"
first_byte_within = "28s"
stalled_max = "15m"
"#;
    ["", whole, "disks = [\"/mnt/a\"]\nexecutor = \"blocking\"\nbase_cache = \"direct\"\n", "thread = 3\n"]
        .map(|text| text.as_bytes().to_vec())
        .to_vec()
}

/// Each after the byte that says what it is.
pub fn texts() -> Vec<Vec<u8>> {
    let sha512 = "0a".repeat(64);
    let named = format!("SHA512:{sha512}");
    let sha256 = format!("sha256:{}", "0b".repeat(32));
    let all: [(u8, &[&str]); 5] = [
        (0, &["90", "90s", "5m", "1h30m", "500ms", "PT36H", "18446744073709551615"]),
        (1, &["0", "512b", "10G", "1.5M", ".5k", "16E", "0.0001T"]),
        (2, &["debian-12.5_amd64.raw", ".hidden", "a/b", "~"]),
        (3, &[&sha512, &named, &sha256]),
        (
            4,
            &[
                "https://us%40er:s%3Aecret@example.org/a.raw?sig=XYZ#f",
                "http://[::1]:8080/a",
                "HTTP://EXAMPLE/%zz",
            ],
        ),
    ];
    all.iter()
        .flat_map(|(kind, texts)| texts.iter().map(|text| [&[*kind], text.as_bytes()].concat()))
        .collect()
}

/// What was asked, the status, the headers.
pub fn answers() -> Vec<Vec<u8>> {
    [
        "0 - -\n200\ncontent-length: 1000\netag: \"abc\"\n",
        "0 - given\n200\nlast-modified: Sun, 06 Nov 1994 08:49:37 GMT\ndate: Sun, 06 Nov 1994 08:49:40 GMT\n",
        "0 - -\n200\ntransfer-encoding: chunked\ncontent-encoding: gzip\n",
        "500 1000 - \"abc\"\n206\ncontent-range: bytes 500-999/1000\netag: \"abc\"\n",
        "1000 1000 - \"abc\"\n416\ncontent-range: bytes */1000\n",
        "5 - given Sun, 06 Nov 1994 08:49:37 GMT\n206\ncontent-range: bytes=5-9/*\n",
        "0 - -\n503\nretry-after: 17\n",
        "0 - -\n401\nwww-authenticate: Basic\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

/// One request of every route.
pub fn requests() -> Vec<Vec<u8>> {
    let bodies = [
        (
            "POST /v1/images",
            r#"{"name":"a","source":"/a.raw","checksum":null,"deadline_s":60,"internal_snapshot":"1","backing":"none","allow_references":"/d"}"#,
        ),
        (
            "POST /v1/images/a/export",
            r#"{"path":"/x","format":"qcow2","compress":"zstd","cluster_size_bytes":65536,"digest_file":true,"digest_guest":true,"existing":"replace"}"#,
        ),
        ("POST /v1/images/a/content", "the bytes"),
        ("POST /v1/volumes", r#"{"name":"v","image":"a","size_bytes":1048576}"#),
        ("POST /v1/volumes/v/resize", r#"{"size_bytes":2097152}"#),
        ("POST /v1/volumes/v/clone", r#"{"name":"w","snapshot":"s","method":"full"}"#),
        ("POST /v1/volumes/v/export", r#"{"path":"/x","snapshot":"s","format":"raw"}"#),
        ("POST /v1/volumes/v/snapshots", r#"{"name":"s"}"#),
        ("POST /v1/volumes/v/snapshots/s/revert", r#"{"snapshot_first":"t"}"#),
    ];
    let bare = [
        "GET /healthz",
        "GET /livez",
        "GET /readyz",
        "GET /metrics",
        "GET /openapi.json",
        "GET /v1/node",
        "GET /v1/images",
        "GET /v1/images/a",
        "DELETE /v1/images/a",
        "POST /v1/images/a/cancel",
        "POST /v1/images/a/verify",
        "GET /v1/images/a/content",
        "GET /v1/volumes",
        "GET /v1/volumes/v%20",
        "DELETE /v1/volumes/v",
        "POST /v1/volumes/v/flatten",
        "POST /v1/volumes/v/recover",
        "POST /v1/volumes/v/attach",
        "POST /v1/volumes/v/detach",
        "GET /v1/volumes/v/content?snapshot=s%2f",
        "GET /v1/volumes/v/snapshots",
        "DELETE /v1/volumes/v/snapshots/s",
        "GET /v1/jobs",
        "GET /v1/jobs/7",
        "POST /v1/jobs/18446744073709551616/cancel",
        "PATCH /v1/images",
        "GET /nowhere",
    ];
    let with_body = bodies.iter().map(|(line, body)| {
        let len = body.len();
        format!("{line} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len}\r\n\r\n{body}")
    });
    let chunked = "POST /v1/images/a/content HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nbytes\r\n0\r\n\r\n";
    let two = "GET /healthz HTTP/1.1\r\nhost: x\r\n\r\nGET /livez HTTP/1.0\r\n\r\n";
    with_body
        .chain(bare.iter().map(|line| format!("{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")))
        .chain([chunked.to_owned(), two.to_owned()])
        .map(String::into_bytes)
        .collect()
}
