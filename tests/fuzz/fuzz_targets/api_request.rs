//! What a client sends to the node's socket: bytes, through the server that is shipped, to a node that does nothing.
#![no_main]

use std::{
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{Arc, OnceLock},
    thread,
    time::Duration,
};

use bedplate::api::{routes::Context, server::serve, socket::Listener};
use bedplate_fuzz_targets::node::Nothing;
use libfuzzer_sys::fuzz_target;
use tokio::runtime::Builder;
use tokio_util::sync::CancellationToken;

/// No answer within this is a hang.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// More than any answer of such a node has.
const ANSWER_LEN_MAX: u64 = 1 << 20;

fuzz_target!(|bytes: &[u8]| {
    let mut stream = UnixStream::connect(socket()).expect("the server takes connections");
    stream.set_read_timeout(Some(ANSWER_MAX)).expect("a socket");
    // It may have answered and closed before the last byte.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    match Read::by_ref(&mut stream).take(ANSWER_LEN_MAX).read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => panic!("{error}"),
    }
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1."));
    assert!(!answer.starts_with(b"HTTP/1.1 500"), "{}", String::from_utf8_lossy(&answer));
});

fn socket() -> &'static PathBuf {
    static SOCKET: OnceLock<PathBuf> = OnceLock::new();
    SOCKET.get_or_init(|| {
        let path = PathBuf::from(format!("/dev/shm/bedplate-fuzz-api-{}.socket", std::process::id()));
        let runtime = Builder::new_current_thread().enable_all().build().expect("a thread more");
        let listener = {
            let _inside = runtime.enter();
            Listener::bind(&path, None).expect("a place in memory")
        };
        let context = Context { node: Arc::new(Nothing), metrics: Arc::default() };
        thread::spawn(move || {
            runtime.block_on(serve(listener, context, CancellationToken::new(), Duration::ZERO));
        });
        path
    })
}
