//! Where settings come from, in which order, and what is refused.

use std::os::unix::fs::symlink;

use super::*;

fn parse(text: &str) -> Result<Settings, ConfigError> {
    Settings::parse(text, Path::new("c.toml"))
}

#[test]
fn the_file_is_under_the_flags_and_over_the_defaults() {
    let file = parse("state = '/s'\nthreads = 8\ndisks = ['/a', '/b']\nallow_other = true").unwrap();
    let flags = Settings { threads: NonZeroUsize::new(3), ..Settings::default() };
    let config = flags.over(file).finish().unwrap();
    assert_eq!(config.threads.get(), 3);
    assert_eq!(config.disks, [PathBuf::from("/a"), PathBuf::from("/b")]);
    assert_eq!(config.mount, Path::new("/s/mount"));
    assert_eq!(config.socket, Path::new("/s/bedplate.sock"));
    assert_eq!(config.mount_mode.bits(), 0o600);
    assert!(matches!(config.sharing, Sharing::Others));
}

#[test]
fn an_unknown_key_is_refused_by_name_with_the_one_that_was_meant() {
    let error = parse("state = '/s'\ndisk = ['/a']").unwrap_err();
    assert_eq!(error.to_string(), "c.toml: unknown key \"disk\"; did you mean \"disks\"?");
    let error = parse("colour = 1").unwrap_err();
    assert!(matches!(&error, ConfigError::UnknownKey { suggestion: None, .. }), "{error}");
    assert!(error.to_string().contains("mount_mode"));
}

#[test]
fn every_field_is_a_known_key() {
    let text = "state='/s'\ndisks=['/d']\nmount='/m'\nmount_mode='0660'\nallow_other=false\nthreads=1\nexecutor='ring'\nfuse_transport='uring'\nlow_latency=true\n\
                    image_jobs=2\nimage_deadline='2h30m'\nimage_reserve='10G'\nbase_cache='direct'\nlog='debug'\nlog_format='json'\nsocket='/k'\nsocket_group='root'\n\
                    [http]\nconnect_timeout='4s'\nidle_timeout='10s'\nfirst_byte_within='1m'\nstalled_max='1h'";
    let settings = parse(text).unwrap();
    assert_eq!(toml::from_str::<toml::Table>(text).unwrap().len(), KEYS.len());
    let config = settings.finish().unwrap();
    assert_eq!(config.executor, Executor::Ring);
    assert_eq!(config.fuse_transport, FuseTransport::Uring);
    assert_eq!(config.image_deadline, Duration::from_secs(9000));
    assert_eq!(config.http.idle_timeout, Duration::from_secs(10));
    assert_eq!(config.http.stalled_max, Duration::from_secs(3600));
    assert_eq!(parse(&config.to_toml()).unwrap().finish().unwrap(), config);
}

#[test]
fn a_wrong_type_or_syntax_is_refused_with_its_line() {
    for text in [
        "[http]\nidle = '3s'",
        "[http]\nidle_timeout = 'soon'",
        "state = '/s'\nthreads = 'many'",
        "state = '/s'\nthreads = ",
        "state = '/s'\nthreads = 0",
        "state = '/s'\nbase_cache = 'none'",
        "state = '/s'\nimage_reserve = 'much'",
    ] {
        let message = parse(text).unwrap_err().to_string();
        assert!(message.starts_with("c.toml: line 2: ") && !message.contains('\n'), "{message}");
    }
}

#[test]
fn values_that_cannot_work_are_refused_by_their_key() {
    let table: [(&str, &str); 12] = [
        ("mount_mode = '4755'", "mount_mode"),
        ("mount_mode = 'rw'", "mount_mode"),
        ("threads = 1000", "threads"),
        ("image_jobs = 1000", "image_jobs"),
        ("image_deadline = '0s'", "image_deadline"),
        ("[http]\nidle_timeout = '10ms'", "idle_timeout"),
        ("log = 'a=b=c'", "log"),
        ("disks = []", "disks"),
        ("disks = ['/a', '/a']", "disks"),
        ("disks = ['/a']\nmount = '/a/m'", "mount"),
        ("mount = '/m'\nsocket = '/m/s'", "socket"),
        ("socket_group = 'no-such-group'", "socket_group"),
    ];
    for (text, wrong) in table {
        match parse(text).unwrap().finish() {
            Err(ConfigError::Value { key, .. }) => assert_eq!(key, wrong, "{text}"),
            other => panic!("{text}: {other:?}"),
        }
    }
}

#[test]
fn links_do_not_hide_that_places_lie_in_one_another() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("real/disk")).unwrap();
    symlink("real", at("link")).unwrap();
    symlink(at("link/disk"), at("again")).unwrap();
    symlink("round", at("round")).unwrap();
    let real = dir.path().canonicalize().unwrap().join("real");
    assert_eq!(resolve(&at("again/x/../y")), real.join("disk/y"));
    assert_eq!(resolve(&at("round")).file_name(), Some("round".as_ref()));
    let settings = |disk: &str, mount: &str| Settings {
        disks: Some(vec![at(disk)]),
        mount: Some(at(mount)),
        ..Settings::default()
    };
    assert_eq!(settings("other", "link/m").finish().unwrap().mount, real.join("m"));
    for (disk, mount) in [("again", "real/disk/m"), ("real/disk", "again"), ("real/disk", "link")] {
        let refused = settings(disk, mount).finish();
        assert!(matches!(refused, Err(ConfigError::Value { key: "mount", .. })), "{disk} {mount}");
    }
}

#[test]
fn the_command_line_finds_the_socket_where_the_environment_puts_the_state() {
    assert_eq!(socket_in(None), Path::new("/var/lib/bedplate/bedplate.sock"));
    assert_eq!(socket_in(Some("".into())), socket_in(None));
    assert_eq!(socket_in(Some("/x".into())), Path::new("/x/bedplate.sock"));
}
