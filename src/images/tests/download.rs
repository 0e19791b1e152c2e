//! Downloads from origins that break, change, lie or refuse.

use bedplate_engine::export;

use super::{
    origin::{Answer, Origin, Pace},
    *,
};
use crate::prep::{
    export::{Wanted, export_file},
    progress::Meter,
    stop::Stop,
    testing::MemoryDevice,
};

const LEN: usize = 5_000_123;

/// Each byte was sent once: the parts follow each other without a gap or an overlap.
fn assert_each_byte_once(origin: &Origin, len: usize) {
    let mut at = 0;
    for (asked, sent) in origin.seen() {
        assert!(sent == 0 || asked.first() == at, "asked from {} where {at} had arrived", asked.first());
        at += sent;
    }
    assert_eq!(at, len);
}

#[test]
fn a_download_is_ready_with_the_sum_of_its_bytes() {
    let content = noise(LEN, 1);
    let origin = Origin::file(&content);
    let node = Node::new();
    let pending = node.create("a", &origin.url("/a.raw?x=1"), Some(&sha512(&content))).unwrap();
    assert!(matches!(pending.state, ImageState::Pending | ImageState::InProgress | ImageState::Ready));
    let info = node.wait("a").unwrap();
    assert_eq!(info.state, ImageState::Ready);
    assert_eq!(info.sha512.as_deref(), Some(sha512(&content).as_str()));
    assert_eq!(info.size_bytes, Some(LEN as u64));
    assert_eq!(info.virtual_size_bytes, Some(5_000_192));
    assert_eq!(info.format, Some(Format::Raw));
    assert!(node.content("a") == content);
    assert_each_byte_once(&origin, LEN);
    assert_eq!(origin.seen()[0].0.header("accept-encoding"), Some("identity"));
}

#[test]
fn a_broken_download_goes_on_where_it_broke() {
    let content = noise(LEN, 2);
    for cuts in [vec![0, 1, 4095], vec![1 << 20, 1 << 20], vec![3_333_333], vec![LEN - 1], vec![100; 20]] {
        let (body, cut_at) = (content.clone(), cuts.clone());
        let origin = Origin::start(move |asked| {
            let answer = Answer::file(asked, &body, "\"v1\"");
            match cut_at.get(asked.index) {
                Some(cut) => answer.cut(*cut),
                None => answer,
            }
        });
        let node = Node::new();
        node.bring("a", &origin.url("/a")).unwrap_or_else(|e| panic!("{cuts:?}: {e}"));
        assert!(node.content("a") == content, "{cuts:?}");
        assert_each_byte_once(&origin, LEN);
        assert_eq!(origin.seen().len(), cuts.len() + 1, "{cuts:?}");
        assert!(origin.seen()[cuts.len()].0.header("if-range").is_none_or(|tag| tag == "\"v1\""));
    }
}

#[test]
fn a_silent_connection_is_given_up_after_the_idle_limit_and_resumed() {
    let content = noise(LEN, 3);
    let body = content.clone();
    let origin = Origin::start(move |asked| {
        let answer = Answer::file(asked, &body, "\"v1\"");
        if asked.index == 0 { answer.cut(1_234_567).paced(Pace::Stall) } else { answer }
    });
    let node = Node::new();
    node.create("a", &origin.url("/a"), None).unwrap();
    let info = node.until("a", "the second attempt", |info| {
        info.state == ImageState::Ready || info.copies[0].progress.as_ref().is_some_and(|p| p.attempt > 1)
    });
    if let Some(progress) = &info.copies[0].progress {
        assert!(progress.last_error.as_ref().is_some_and(|e| e.contains("nothing came")), "{progress:?}");
    }
    node.wait("a").unwrap();
    assert!(node.content("a") == content);
    assert_each_byte_once(&origin, LEN);
}

#[test]
fn a_trickle_is_slow_but_not_idle() {
    let content = noise(3000, 4);
    let body = content.clone();
    let origin = Origin::start(move |asked| {
        Answer::file(asked, &body, "\"v1\"").paced(Pace::Trickle(300, Duration::from_millis(250)))
    });
    // All of it takes longer than this, and a piece so much less that a busy machine makes none late.
    let mut settings = settings();
    settings.http.idle_timeout = Duration::from_secs(2);
    let node = Node::with(settings);
    node.bring("a", &origin.url("/a")).unwrap();
    assert_eq!(origin.seen().len(), 1);
}

#[test]
fn an_origin_without_ranges_is_read_again_from_its_start() {
    let content = noise(LEN, 5);
    let body = content.clone();
    let origin = Origin::start(move |asked| {
        let answer = Answer::whole(&body, "etag: \"v1\"\r\n");
        if asked.index < 2 { answer.cut(2_000_000) } else { answer }
    });
    let node = Node::new();
    let info = node.bring("a", &origin.url("/a")).unwrap();
    assert!(node.content("a") == content);
    assert_eq!(info.sha512, Some(sha512(&content)));
    assert_eq!(origin.seen().len(), 3);
}

#[test]
fn a_part_that_is_not_the_one_asked_for_is_not_believed() {
    let content = noise(LEN, 6);
    let body = content.clone();
    let origin = Origin::start(move |asked| match asked.index {
        0 => Answer::whole(&body, "etag: \"v1\"\r\n").cut(2_000_000),
        // Some other part, labelled as what it is.
        1 => Answer::part(&body, 1_000_000, "etag: \"v1\"\r\n"),
        _ => Answer::file(asked, &body, "\"v1\""),
    });
    let node = Node::new();
    node.bring("a", &origin.url("/a")).unwrap();
    assert!(node.content("a") == content);
    assert_eq!(origin.seen().last().unwrap().0.first(), 0);
}

#[test]
fn a_file_that_changes_in_the_middle_is_fetched_anew_and_never_mixed() {
    let (old, new) = (noise(LEN, 7), noise(LEN, 8));
    for ignores_if_range in [false, true] {
        let (first, second) = (old.clone(), new.clone());
        let origin = Origin::start(move |asked| match asked.index {
            0 => Answer::file(asked, &first, "\"old\"").cut(2_000_000),
            1 if ignores_if_range => Answer::part(&second, asked.first(), "etag: \"new\"\r\n"),
            _ => Answer::file(asked, &second, "\"new\""),
        });
        let node = Node::new();
        let info = node.bring("a", &origin.url("/a")).unwrap();
        assert!(node.content("a") == new);
        assert_eq!(info.sha512, Some(sha512(&new)));
    }
}

#[test]
fn without_a_validator_only_a_checksum_makes_a_range_safe() {
    let content = noise(LEN, 9);
    for checksum in [None, Some(sha512(&content))] {
        let body = content.clone();
        let origin = Origin::start(move |asked| {
            let answer = match asked.first() {
                0 => Answer::whole(&body, ""),
                first => Answer::part(&body, first, ""),
            };
            if asked.index == 0 { answer.cut(2_000_000) } else { answer }
        });
        let node = Node::new();
        node.create("a", &origin.url("/a"), checksum.as_deref()).unwrap();
        node.wait("a").unwrap();
        assert!(node.content("a") == content);
        let second = origin.seen()[1].0.first();
        assert_eq!(second, if checksum.is_some() { 2_000_000 } else { 0 });
    }
}

#[test]
fn a_splice_that_fails_its_checksum_is_fetched_once_more_in_one_piece() {
    let (old, new) = (noise(LEN, 7), noise(LEN, 8));
    let (first, second) = (old, new.clone());
    let origin = Origin::start(move |asked| match (asked.index, asked.first()) {
        (0, _) => Answer::whole(&first, "").cut(2_000_000),
        (_, 0) => Answer::whole(&second, ""),
        (_, from) => Answer::part(&second, from, ""),
    });
    let node = Node::new();
    node.create("a", &origin.url("/a"), Some(&sha512(&new))).unwrap();
    node.wait("a").unwrap();
    assert!(node.content("a") == new);
}

#[test]
fn chunks_are_complete_only_at_their_clean_end() {
    let content = noise(LEN, 10);
    let body = content.clone();
    let origin = Origin::start(move |asked| match (asked.index, asked.first()) {
        (0, _) => Answer::chunked(&body, "etag: \"v1\"\r\n", Some(2_000_000)),
        (1, _) => Answer::status("503 Busy"),
        // Everything but the last chunk's end.
        (2, first) => Answer::part(&body, first, "etag: \"v1\"\r\n").cut(1_000_000),
        _ => Answer::file(asked, &body, "\"v1\""),
    });
    let node = Node::new();
    node.bring("a", &origin.url("/a")).unwrap();
    assert!(node.content("a") == content);

    let body = content.clone();
    let origin = Origin::start(move |_| Answer::chunked(&body, "", None));
    node.bring("b", &origin.url("/b")).unwrap();
    assert!(node.content("b") == content);
}

#[test]
fn all_bytes_without_the_last_chunk_are_complete_once_the_origin_says_there_are_no_more() {
    let content = noise(LEN, 11);
    let body = content.clone();
    let origin = Origin::start(move |asked| match asked.index {
        0 => Answer::chunked(&body, "etag: \"v1\"\r\n", Some(body.len())),
        _ => Answer::file(asked, &body, "\"v1\""),
    });
    let node = Node::new();
    node.bring("a", &origin.url("/a")).unwrap();
    assert!(node.content("a") == content);
    assert_eq!(origin.seen()[1].0.first(), LEN, "asked for what follows, answered 416");
}

#[test]
fn an_origin_that_lies_about_the_length_never_becomes_ready() {
    let content = noise(1_000_000, 12);
    let origin = Origin::start(move |asked| {
        // It says twice what it has.
        let mut claimed = content.clone();
        claimed.resize(2_000_000, 1);
        let first = asked.first();
        Answer::file(asked, &claimed, "\"v1\"").cut(content.len().saturating_sub(first))
    });
    let node = Node::new();
    let failure = failure(node.bring("a", &origin.url("/a")));
    assert_eq!(failure.code, FailureCode::Source);
    assert!(failure.message.contains("nothing new came"), "{}", failure.message);
}

#[test]
fn servers_in_trouble_are_asked_again() {
    let content = noise(LEN, 13);
    let body = content.clone();
    let origin = Origin::start(move |asked| match asked.index {
        0 => Answer::status("500 Oops"),
        1 => Answer::status("503 Busy"),
        2 => Answer::file(asked, &body, "\"v1\"").cut(1_500_000),
        3 => Answer::status("502 Gone fishing"),
        _ => Answer::file(asked, &body, "\"v1\""),
    });
    let node = Node::new();
    node.bring("a", &origin.url("/a")).unwrap();
    assert_each_byte_once(&origin, LEN);
}

#[test]
fn an_origin_that_only_ever_redirects_slowly_is_given_up_as_soon_as_any_other() {
    let mut settings = settings();
    settings.http.idle_timeout = PATIENCE;
    settings.http.first_byte_within = Duration::from_millis(900);
    let node = Node::with(settings);
    let origin = Origin::start(|asked| {
        // The pace of a slow server is what is tested, not a wait for a result.
        std::thread::sleep(Duration::from_millis(300));
        Answer::redirect(&format!("/{}", asked.index))
    });
    let failed = failure(node.bring("a", &origin.url("/a")));
    assert!(failed.message.contains("no answer within"), "{}", failed.message);
    assert!(failed.message.contains("no byte ever came"), "{}", failed.message);
}

#[test]
fn an_origin_that_answers_and_then_sends_no_byte_is_given_up_as_soon_as_any_other() {
    let mut settings = settings();
    settings.http.idle_timeout = PATIENCE;
    settings.http.first_byte_within = Duration::from_millis(900);
    let node = Node::with(settings);
    let origin = Origin::start(|_| Answer::whole(&[1; 1000], "").cut(0).paced(Pace::Stall));
    let failed = failure(node.bring("a", &origin.url("/a")));
    assert!(failed.message.contains("no byte ever came"), "{}", failed.message);
}

#[test]
fn what_is_refused_for_its_bytes_does_not_show_the_signature_of_its_url() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let format = export::Format::Qcow2(export::qcow2::Options::default());
    let device = MemoryDevice(vec![7; 1 << 16]);
    let (meter, stop, refuse) = (Meter::default(), Stop::after(PATIENCE), export::Existing::Refuse);
    export_file(&device, &path, refuse, format, Wanted::default(), &meter, &stop).unwrap();
    let good = std::fs::read(path).unwrap();
    let (mut header, mut table) = (good.clone(), good);
    // The version; and, behind the header and the data, the first entry of the mapping table.
    header[7] = 7;
    table[2 << 16..(2 << 16) + 8].copy_from_slice(&(1_u64 << 63 | 1 << 40).to_be_bytes());
    let node = Node::new();
    for (name, bytes, part) in [("a", header, "version 7"), ("b", table, "L2")] {
        let origin = Origin::file(&bytes);
        let failed = failure(node.bring(name, &origin.url("/a.qcow2?sig=secret")));
        assert!(failed.message.contains(part) && failed.message.contains("/a.qcow2"), "{}", failed.message);
        assert!(!failed.message.contains("secret"), "{}", failed.message);
    }
}

#[test]
fn an_origin_that_refuses_from_the_first_try_on_is_given_up_soon() {
    let node = Node::new();
    // The near end of a connection: nobody listens there, and nobody else is given that port meanwhile.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let connection = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let closed = connection.local_addr().unwrap();
    let refused = failure(node.bring("a", &format!("http://{closed}/a")));
    assert_eq!(refused.code, FailureCode::Source);
    assert!(refused.message.contains("refused"), "{}", refused.message);

    let origin = Origin::start(|_| Answer::status("404 Not Found"));
    let missing = failure(node.bring("b", &origin.url("/b")));
    assert!(missing.message.contains("404"), "{}", missing.message);
    assert_eq!(origin.seen().len(), 1, "an answer like this does not get better by asking again");
}

#[test]
fn wrong_bytes_fail_with_both_sums_and_are_gone_while_the_record_tells() {
    let content = noise(LEN, 14);
    let origin = Origin::file(&content);
    let node = Node::new();
    let wanted = sha512(b"something else");
    node.create("a", &origin.url("/a"), Some(&wanted)).unwrap();
    let failure = failure(node.wait("a"));
    assert_eq!(failure.code, FailureCode::Checksum);
    assert!(failure.message.contains(&wanted) && failure.message.contains(&sha512(&content)));
    let files: Vec<_> =
        std::fs::read_dir(node.image_dir("a")).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert_eq!(files, ["image.json"]);
    assert_eq!(node.images.get("a").unwrap().allocated_bytes, 0);

    let node = node.restart();
    assert!(
        matches!(node.images.get("a").unwrap().state, ImageState::Failed(f) if f.code == FailureCode::Checksum)
    );
    node.delete("a").unwrap();
    node.create("a", &origin.url("/a"), Some(&sha512(&content))).unwrap();
    node.wait("a").unwrap();
}

#[test]
fn a_sha256_will_do() {
    let content = noise(LEN, 15);
    let origin = Origin::file(&content);
    let node = Node::new();
    let sum = format!("sha256:{}", hex(&sha2::Sha256::digest(&content)));
    node.create("a", &origin.url("/a"), Some(&sum)).unwrap();
    assert_eq!(node.wait("a").unwrap().sha512, Some(sha512(&content)));
    node.create("b", &origin.url("/a"), Some(&format!("sha256:{}", "0".repeat(64)))).unwrap();
    assert_eq!(failure(node.wait("b")).code, FailureCode::Checksum);
}

#[test]
fn secrets_do_not_follow_a_redirect_to_another_origin() {
    let content = noise(100_000, 16);
    let other = Origin::file(&content);
    let (there, home) = (other.url("/there"), Arc::new(Mutex::new(String::new())));
    let here = home.clone();
    let origin = Origin::start(move |asked| match asked.path.as_str() {
        "/a" => Answer::redirect("/moved"),
        "/moved" => Answer::redirect(&there),
        "/back" => Answer::redirect(&format!("{}/a", here.lock().unwrap())),
        path => panic!("{path}"),
    });
    *home.lock().unwrap() = origin.url("");
    let node = Node::new();
    node.bring("a", &format!("http://user:secret@{}/a", origin.addr())).unwrap();
    assert!(node.content("a") == content);
    for (asked, _) in origin.seen() {
        assert_eq!(asked.header("authorization"), Some("Basic dXNlcjpzZWNyZXQ="), "{}", asked.path);
    }
    for (asked, _) in other.seen() {
        assert_eq!(asked.header("authorization"), None);
        assert_eq!(asked.header("referer"), None);
    }
    let record = std::fs::read_to_string(node.image_dir("a").join("image.json")).unwrap();
    assert!(!record.contains("secret") && !record.contains("user"), "{record}");
    assert!(!format!("{:?}", node.images.list()).contains("secret"));
}

#[test]
fn redirects_end_after_ten() {
    let origin = Origin::start(|_| Answer::redirect("/again"));
    let node = Node::new();
    let failure = failure(node.bring("a", &origin.url("/a")));
    assert!(failure.message.contains("redirects"), "{}", failure.message);
    assert_eq!(origin.seen().len(), 11);
    let elsewhere = Origin::start(|_| Answer::redirect("file:///etc/passwd"));
    let failure = super::failure(node.bring("b", &elsewhere.url("/b")));
    assert!(failure.message.contains("file"), "{}", failure.message);
}

#[test]
fn an_encoded_body_is_refused_though_it_would_arrive() {
    let origin = Origin::start(|_| Answer::whole(&[1; 1000], "content-encoding: gzip\r\n"));
    let node = Node::new();
    let failure = failure(node.bring("a", &origin.url("/a")));
    assert!(failure.message.contains("gzip"), "{}", failure.message);
}

#[test]
fn zeros_of_a_download_become_holes() {
    let mut content = vec![0; 8 << 20];
    content[1 << 20..(1 << 20) + 100_000].copy_from_slice(&noise(100_000, 17));
    let origin = Origin::file(&content);
    let node = Node::new();
    let info = node.bring("a", &origin.url("/a")).unwrap();
    assert!(node.content("a") == content);
    assert!(info.allocated_bytes <= 110_000, "{}", info.allocated_bytes);
}

#[test]
fn a_job_ends_at_its_deadline() {
    let content = noise(LEN, 18);
    let origin = Origin::start(move |asked| {
        Answer::file(asked, &content, "\"v1\"").paced(Pace::Trickle(1000, Duration::from_millis(50)))
    });
    let node = Node::new();
    let request = CreateImage {
        name: "a".to_owned(),
        from: origin.url("/a"),
        checksum: None,
        disk: None,
        deadline: Some(Duration::from_secs(1)),
        internal_snapshot: None,
        parts: Parts::default(),
    };
    node.images.create(&request).unwrap();
    let early = node.runtime.block_on(node.images.wait("a", Duration::from_millis(50)));
    assert!(matches!(early, Err(Error::TimedOut { .. })));
    assert_eq!(failure(node.wait("a")).code, FailureCode::TimedOut);
}
