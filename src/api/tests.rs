//! The API over a real socket, with a node in memory behind it.

use std::{
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    sync::{Arc, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use super::{
    client::{Client, Error},
    fake::{self, BROKEN, FakeNode, VOLUME},
    node::Readiness,
    problem::Code,
    routes::Context,
    server::{self, BODY_BYTES_MAX},
    socket::{ListenError, Listener},
    types::{CloneVolume, CreateImage, CreateVolume, ImageState, ResizeVolume},
};
use crate::telemetry::Metrics;

struct Server {
    dir: tempfile::TempDir,
    node: Arc<FakeNode>,
    client: Client,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Server {
    fn start() -> Server {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let node = FakeNode::shared();
        let context = Context { node: node.clone(), metrics: Arc::new(Metrics::default()) };
        let stop = CancellationToken::new();
        let listener = Listener::bind(&socket, None).unwrap();
        let task = tokio::spawn(server::serve(listener, context, stop.clone(), Duration::from_secs(5)));
        Server { dir, node, client: Client::new(socket), stop, task }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }

    /// What the server answers to these bytes until it closes.
    async fn raw(&self, request: &str) -> String {
        let mut stream = UnixStream::connect(self.socket()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn get(&self, path: &str) -> String {
        self.raw(&format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")).await
    }
}

fn refused(error: Error) -> Code {
    match error {
        Error::Refused(problem) => problem.code,
        other => panic!("not a refusal: {other}"),
    }
}

#[tokio::test]
async fn a_volume_is_made_read_and_deleted_over_the_socket() {
    let server = Server::start();
    let request = CreateVolume { name: "v".to_owned(), image: None, size_bytes: Some(1 << 20) };
    assert_eq!(server.client.create_volume(&request).await.unwrap().size_bytes, 1 << 20);
    assert_eq!(server.client.volumes().await.unwrap().len(), 2);
    assert_eq!(server.client.volume("v").await.unwrap().name, "v");
    let resized = server.client.resize_volume("v", &ResizeVolume { size_bytes: 2 << 20 }).await.unwrap();
    assert_eq!(resized.size_bytes, 2 << 20);
    server.client.delete_volume("v").await.unwrap();
    assert_eq!(refused(server.client.volume("v").await.unwrap_err()), Code::NotFound);
    server.stop().await;
}

#[tokio::test]
async fn an_image_begins_pending_and_a_refused_delete_names_the_users() {
    let server = Server::start();
    let request = CreateImage {
        name: "a".to_owned(),
        source: "http://h/a".to_owned(),
        checksum: None,
        deadline_s: None,
        internal_snapshot: None,
        backing: None,
        allow_references: None,
    };
    assert_eq!(server.client.create_image(&request).await.unwrap().state, ImageState::Pending);
    let error = server.client.delete_image("a").await.unwrap_err();
    assert!(error.to_string().contains("volume root"), "{error}");
    assert_eq!(refused(error), Code::InUse);
    server.stop().await;
}

#[tokio::test]
async fn an_upload_reaches_the_node_byte_for_byte_and_one_that_nobody_takes_is_answered() {
    let server = Server::start();
    let content: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let (to_send, parts) = tokio::sync::mpsc::channel(1);
    let sent = content.clone();
    let sender = tokio::spawn(async move {
        for part in sent.chunks(100_001) {
            to_send.send(Ok(Some(hyper::body::Bytes::copy_from_slice(part)))).await.unwrap();
        }
        to_send.send(Ok(None)).await.unwrap();
    });
    server.client.upload_image("a", parts).await.unwrap();
    sender.await.unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while *server.node.uploaded.lock().unwrap_or_else(PoisonError::into_inner) != content {
        assert!(std::time::Instant::now() < deadline, "the node has other bytes");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    // Whoever sends more than a node's buffers hold sees that it hangs up; the small one sees the answer.
    let (to_send, parts) = tokio::sync::mpsc::channel(1);
    let open = to_send.clone();
    drop(to_send);
    let image = server.client.upload_image(BROKEN, parts).await.unwrap();
    assert_eq!(image.name, BROKEN);
    drop(open);
    server.stop().await;
}

#[tokio::test]
async fn an_upload_whose_sender_goes_away_before_the_end_is_never_whole() {
    let server = Server::start();
    let (to_send, parts) = tokio::sync::mpsc::channel(1);
    to_send.send(Ok(Some(hyper::body::Bytes::from_static(b"half of it")))).await.unwrap();
    drop(to_send);
    let error = server.client.upload_image("a", parts).await.unwrap_err();
    assert!(matches!(error, Error::Broken { .. }), "{error}");
    // Stopping waits for the request, which by then has handed on whatever it was to hand on.
    let uploaded = server.node.uploaded.clone();
    server.stop().await;
    assert_eq!(*uploaded.lock().unwrap_or_else(PoisonError::into_inner), b"");
}

#[tokio::test]
async fn the_route_that_takes_as_long_as_its_body_is_the_one_of_uploads() {
    let server = Server::start();
    let answer = server.get("/openapi.json").await;
    let document: serde_json::Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
    let (method, path) = super::routes::UPLOAD;
    let operation = &document["paths"][path][method.as_str().to_lowercase()];
    assert!(operation["requestBody"]["content"]["application/octet-stream"].is_object(), "{operation}");
    // As the server itself calls it when it counts the request.
    let (to_send, parts) = tokio::sync::mpsc::channel(1);
    to_send.send(Ok(None)).await.unwrap();
    server.client.upload_image("a", parts).await.unwrap();
    assert!(server.get("/metrics").await.contains(path), "{path}");
    server.stop().await;
}

#[tokio::test]
async fn names_with_any_character_reach_the_node_as_they_are() {
    let server = Server::start();
    for name in ["a/b", "..", "a b", "ä?x=1#y", "%2f"] {
        let error = server.client.volume(name).await.unwrap_err();
        assert!(error.to_string().contains(&format!("{name:?}")), "{error}");
    }
    server.stop().await;
}

#[tokio::test]
async fn content_arrives_whole_with_its_holes_as_zeros() {
    let server = Server::start();
    let mut content = Vec::new();
    let len = server.client.volume_content(VOLUME, None, &mut content).await.unwrap();
    assert_eq!(len, server.node.device.size);
    assert!(content == fake::content(&server.node.device));
    server.stop().await;
}

#[tokio::test]
async fn content_that_cannot_be_read_ends_in_an_error_and_not_in_a_short_file() {
    let server = Server::start();
    let mut content = Vec::new();
    let error = server.client.volume_content(VOLUME, Some(BROKEN), &mut content).await.unwrap_err();
    assert!(matches!(error, Error::Broken { .. }), "{error}");
    server.stop().await;
}

#[tokio::test]
async fn a_short_job_is_answered_as_done_and_an_unknown_one_is_not_found() {
    let server = Server::start();
    let request = CloneVolume { name: "b".to_owned(), snapshot: None, method: Default::default() };
    let job = server.client.clone_volume(VOLUME, &request).await.unwrap();
    assert_eq!(job.state, super::types::JobState::Done);
    assert_eq!(refused(server.client.job(8).await.unwrap_err()), Code::NotFound);
    assert!(server.get("/v1/jobs/x").await.contains("not_found"));
    server.stop().await;
}

#[tokio::test]
async fn a_fault_of_the_node_is_answered_and_stops_nobody_else() {
    let server = Server::start();
    assert_eq!(refused(server.client.flatten_volume(VOLUME).await.unwrap_err()), Code::Internal);
    assert!(server.client.node().await.is_ok());
    server.stop().await;
}

#[tokio::test]
async fn what_is_not_a_request_of_this_api_gets_a_problem_document() {
    let server = Server::start();
    let answer = server.get("/v2/volumes").await;
    assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("application/problem+json"), "{answer}");
    assert!(server.get("/v1/volumes/a/resize").await.contains("no_such_route"));
    assert!(server.get("/v1/volumes/root/content?snap=a").await.contains("\"invalid\""));
    let post = |body: &str| {
        let head =
            "POST /v1/volumes HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close";
        format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    };
    let unknown_field = server.raw(&post("{\"name\": \"a\", \"colour\": 1}")).await;
    assert!(unknown_field.starts_with("HTTP/1.1 400") && unknown_field.contains("colour"), "{unknown_field}");
    let long = server.raw(&post(&" ".repeat(BODY_BYTES_MAX + 1))).await;
    assert!(long.contains("too_large"), "{long}");
    server.stop().await;
}

#[tokio::test]
async fn health_is_answered_always_and_readiness_says_why_not() {
    let server = Server::start();
    for path in ["/healthz", "/livez", "/readyz"] {
        assert!(server.get(path).await.starts_with("HTTP/1.1 200"), "{path}");
    }
    *server.node.readiness.lock().unwrap_or_else(PoisonError::into_inner) =
        Readiness::NotReady("the mount is gone".to_owned());
    assert!(server.get("/healthz").await.starts_with("HTTP/1.1 200"));
    let answer = server.get("/readyz").await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("the mount is gone"), "{answer}");
    server.stop().await;
}

#[tokio::test]
async fn metrics_show_states_disks_and_the_requests_that_were_answered() {
    let server = Server::start();
    server.client.volumes().await.unwrap();
    let text = server.get("/metrics").await;
    for line in [
        "bedplate_images{state=\"ready\"} 1",
        "bedplate_volumes{state=\"failed\"} 0",
        "bedplate_volume_allocated_bytes{volume=\"root\"} 0",
        "bedplate_disk_free_bytes{disk=\"/disk\"} 5",
        "bedplate_disk_up{disk=\"/disk\"} 0",
        "bedplate_disk_executor{disk=\"/disk\",executor=\"ring\"} 1",
        "bedplate_disk_executor{disk=\"/disk\",executor=\"blocking\"} 0",
        "bedplate_mount_transport{transport=\"uring\"} 1",
        "bedplate_mount_transport{transport=\"classic\"} 0",
        "bedplate_open_files{path=\"passthrough\"} 0",
        "bedplate_requests_total{method=\"GET\",route=\"/v1/volumes\",status=\"200\"} 1",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    server.stop().await;
}

#[tokio::test]
async fn the_openapi_document_describes_every_path_with_its_errors() {
    let server = Server::start();
    let answer = server.get("/openapi.json").await;
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let document: serde_json::Value = serde_json::from_str(body).unwrap();
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.contains_key("/v1/volumes/{name}/snapshots/{snapshot}/revert"));
    for (path, methods) in paths {
        for (method, operation) in methods.as_object().unwrap() {
            assert!(operation["summary"].is_string(), "{method} {path}");
            let changes = method != "get" && path.starts_with("/v1/");
            assert!(!changes || operation["responses"]["default"].is_object(), "{method} {path}");
        }
    }
    for name in ["Image", "Volume", "Snapshot", "Job", "Problem", "Code"] {
        assert!(document["components"]["schemas"][name].is_object(), "{name}");
    }
    server.stop().await;
}

#[tokio::test]
async fn the_socket_is_for_user_and_group_and_a_second_node_is_refused_while_one_answers() {
    let server = Server::start();
    let socket = server.socket();
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o660);
    assert!(matches!(Listener::bind(&socket, None), Err(ListenError::Answers { .. })));
    assert!(server.client.node().await.is_ok());
    server.stop().await;
    assert!(!socket.exists());
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_another_file_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let listener = Listener::bind(&socket, None).unwrap();
    drop(listener);
    std::fs::write(&socket, "precious").unwrap();
    assert!(matches!(Listener::bind(&socket, None), Err(ListenError::NotASocket { .. })));
    assert_eq!(std::fs::read(&socket).unwrap(), b"precious");
}

#[tokio::test]
async fn without_a_node_the_error_says_what_to_start() {
    let dir = tempfile::tempdir().unwrap();
    let error = Client::new(dir.path().join("s")).node().await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }));
    assert!(error.to_string().contains("bedplate serve"));
}

#[tokio::test]
async fn idle_connections_do_not_keep_a_stopping_server() {
    let server = Server::start();
    let idle = UnixStream::connect(server.socket()).await.unwrap();
    assert!(server.client.node().await.is_ok());
    server.stop().await;
    drop(idle);
}
