//! An HTTP server for one file, with ranges and a strong entity tag, that counts what it sends and can hold back.
//!
//! Broken and lying origins are tried where downloads are; here the node is what breaks.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use super::run::DEADLINE;

/// Bytes of one send.
const PIECE: usize = 64 << 10;

struct Shared {
    content: Vec<u8>,
    /// Nothing from this offset on is sent before it is raised.
    gate: Mutex<usize>,
    raised: Condvar,
    sent: AtomicU64,
    closing: AtomicBool,
}

/// The server; it ends when it is dropped.
pub struct Origin {
    addr: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Origin {
    pub fn start(content: Vec<u8>) -> Origin {
        let gate = Mutex::new(content.len());
        Origin::over(content, gate)
    }

    /// Only the first `len` bytes are sent until [`Origin::open`].
    pub fn held_at(content: Vec<u8>, len: usize) -> Origin {
        Origin::over(content, Mutex::new(len))
    }

    fn over(content: Vec<u8>, gate: Mutex<usize>) -> Origin {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let (raised, sent, closing) = (Condvar::new(), AtomicU64::new(0), AtomicBool::new(false));
        let shared = Arc::new(Shared { content, gate, raised, sent, closing });
        let for_thread = shared.clone();
        let thread = thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if for_thread.closing.load(Ordering::SeqCst) {
                    break;
                }
                let shared = for_thread.clone();
                // A client that goes away ends its thread.
                thread::spawn(move || drop(serve(stream, &shared)));
            }
        });
        Origin { addr, shared, thread: Some(thread) }
    }

    pub fn url(&self) -> String {
        format!("http://{}/image.raw", self.addr)
    }

    /// Bytes of the file that were sent, all requests together.
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::SeqCst)
    }

    /// Send everything.
    pub fn open(&self) {
        *self.shared.gate.lock().unwrap() = self.shared.content.len();
        self.shared.raised.notify_all();
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        self.open();
        // Wakes the listener, which sees the flag.
        drop(TcpStream::connect(self.addr));
        if let Some(thread) = self.thread.take() {
            // The thread's own panic has been printed.
            drop(thread.join());
        }
    }
}

fn serve(mut stream: TcpStream, shared: &Shared) -> std::io::Result<()> {
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        request.push(byte[0]);
    }
    let request = String::from_utf8_lossy(&request).to_ascii_lowercase();
    let total = shared.content.len();
    let first = request
        .lines()
        .find_map(|line| line.strip_prefix("range: bytes=")?.split('-').next()?.parse::<usize>().ok());
    let first = first.filter(|first| *first < total);
    let (from, status) = match first {
        None => (0, "200 OK".to_owned()),
        Some(first) => {
            let range = format!("206 Partial Content\r\ncontent-range: bytes {first}-{}/{total}", total - 1);
            (first, range)
        }
    };
    let left = total - from;
    write!(
        stream,
        "HTTP/1.1 {status}\r\ncontent-length: {left}\r\netag: \"v1\"\r\naccept-ranges: bytes\r\nconnection: close\r\n\r\n"
    )?;
    if request.starts_with("head ") {
        return Ok(());
    }
    let mut at = from;
    while at < total {
        let mut gate = shared.gate.lock().unwrap();
        while *gate <= at && !shared.closing.load(Ordering::SeqCst) {
            let (guard, timeout) = shared.raised.wait_timeout(gate, DEADLINE).unwrap();
            if timeout.timed_out() {
                return Ok(());
            }
            gate = guard;
        }
        let end = total.min(at + PIECE).min((*gate).max(at));
        drop(gate);
        if shared.closing.load(Ordering::SeqCst) {
            return Ok(());
        }
        stream.write_all(&shared.content[at..end])?;
        shared.sent.fetch_add((end - at) as u64, Ordering::SeqCst);
        at = end;
    }
    stream.flush()
}
