//! An HTTP/1.1 server that does what a test says, byte by byte, and remembers what it was asked.
//!
//! Written on bare sockets: a server library would not send a wrong length, or half a chunk.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

/// A request, as far as it matters. Names of headers are in lower case.
#[derive(Clone, Debug)]
pub struct Asked {
    pub path: String,
    pub headers: Vec<(String, String)>,
    /// The number of this request, from 0.
    pub index: usize,
}

/// How an answer's body leaves.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    Whole,
    /// Everything, then silence.
    Stall,
    /// Pieces of this many bytes, with a pause in between.
    Trickle(usize, Duration),
}

/// What is sent. The connection is closed afterwards.
#[derive(Clone, Debug)]
pub struct Answer {
    pub head: String,
    pub body: Vec<u8>,
    pub pace: Pace,
}

pub struct Origin {
    addr: SocketAddr,
    seen: Arc<Mutex<Vec<(Asked, usize)>>>,
    closing: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Asked {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// The first byte that was asked for.
    pub fn first(&self) -> usize {
        let range = self.header("range").and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-'));
        range.map_or(0, |first| first.parse().unwrap())
    }
}

impl Answer {
    pub fn status(line: &str) -> Answer {
        Answer::new(format!("HTTP/1.1 {line}\r\ncontent-length: 0\r\n"), Vec::new())
    }

    pub fn new(head: String, body: Vec<u8>) -> Answer {
        Answer { head, body, pace: Pace::Whole }
    }

    /// A file with a strong entity tag, as a good server gives it: whole, or the rest from a byte on.
    pub fn file(asked: &Asked, content: &[u8], etag: &str) -> Answer {
        let first = asked.first();
        let same = asked.header("if-range").is_none_or(|tag| tag == etag);
        if first == 0 || !same {
            return Answer::whole(content, &format!("etag: {etag}\r\n"));
        }
        if first >= content.len() {
            let head = format!(
                "HTTP/1.1 416 No\r\ncontent-range: bytes */{}\r\ncontent-length: 0\r\n",
                content.len()
            );
            return Answer::new(head, Vec::new());
        }
        Answer::part(content, first, &format!("etag: {etag}\r\n"))
    }

    pub fn whole(content: &[u8], headers: &str) -> Answer {
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n{headers}", content.len());
        Answer::new(head, content.to_vec())
    }

    pub fn part(content: &[u8], first: usize, headers: &str) -> Answer {
        let (last, total) = (content.len() - 1, content.len());
        let head = format!(
            "HTTP/1.1 206 Partial\r\ncontent-range: bytes {first}-{last}/{total}\r\ncontent-length: {}\r\n{headers}",
            total - first
        );
        Answer::new(head, content[first..].to_vec())
    }

    /// In chunks; without the last one when `cut` is given, which is how many bytes are sent.
    pub fn chunked(content: &[u8], headers: &str, cut: Option<usize>) -> Answer {
        let head = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n{headers}");
        let mut body = Vec::new();
        for chunk in content[..cut.unwrap_or(content.len())].chunks(10_000) {
            body.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
            body.extend_from_slice(chunk);
            body.extend_from_slice(b"\r\n");
        }
        if cut.is_none() {
            body.extend_from_slice(b"0\r\n\r\n");
        }
        Answer::new(head, body)
    }

    pub fn redirect(to: &str) -> Answer {
        Answer::new(format!("HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\n"), Vec::new())
    }

    /// Only this many bytes of the body are sent.
    pub fn cut(mut self, len: usize) -> Answer {
        self.body.truncate(len);
        self
    }

    pub fn paced(mut self, pace: Pace) -> Answer {
        self.pace = pace;
        self
    }
}

impl Origin {
    pub fn start(answer: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Origin {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let closing = Arc::new(AtomicBool::new(false));
        let (log, stop, answer) = (seen.clone(), closing.clone(), Arc::new(answer));
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                let Ok(stream) = stream else { break };
                let (log, stop, answer) = (log.clone(), stop.clone(), answer.clone());
                std::thread::spawn(move || serve(stream, &log, &stop, &*answer));
            }
        });
        Origin { addr, seen, closing, thread: Some(thread) }
    }

    /// A good server for one file.
    pub fn file(content: &[u8]) -> Origin {
        let content = content.to_vec();
        Origin::start(move |asked| Answer::file(asked, &content, "\"v1\""))
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr)
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Every request so far, with the bytes of the body that were sent.
    pub fn seen(&self) -> Vec<(Asked, usize)> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::SeqCst);
        // Wakes the listener, which sees the flag.
        let _ = TcpStream::connect(self.addr);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(
    mut stream: TcpStream,
    seen: &Mutex<Vec<(Asked, usize)>>,
    closing: &AtomicBool,
    answer: &(dyn Fn(&Asked) -> Answer + Send + Sync),
) {
    let Some(text) = request(&mut stream) else { return };
    let mut lines = text.lines();
    let path = lines.next().and_then(|line| line.split(' ').nth(1)).unwrap_or("").to_owned();
    let headers = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let (asked, answer) = {
        let mut seen = seen.lock().unwrap();
        let asked = Asked { path, headers, index: seen.len() };
        seen.push((asked.clone(), 0));
        (asked.clone(), answer(&asked))
    };
    let count = |sent: usize| seen.lock().unwrap()[asked.index].1 += sent;
    if write!(stream, "{}connection: close\r\n\r\n", answer.head).is_err() {
        return;
    }
    let (piece, pause) = match answer.pace {
        Pace::Whole | Pace::Stall => (64 << 10, Duration::ZERO),
        Pace::Trickle(piece, pause) => (piece, pause),
    };
    for part in answer.body.chunks(piece) {
        // The pace of a slow server is what is tested, not a wait for a result.
        std::thread::sleep(pause);
        if closing.load(Ordering::SeqCst) || stream.write_all(part).is_err() {
            return;
        }
        count(part.len());
    }
    if matches!(answer.pace, Pace::Stall) {
        // Until the other side has had enough.
        let _ = stream.set_read_timeout(Some(super::PATIENCE));
        let _ = stream.read(&mut [0]);
    }
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.set_read_timeout(Some(super::PATIENCE));
    let _ = stream.read(&mut [0]);
}

fn request(stream: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).ok()?;
        bytes.push(byte[0]);
    }
    String::from_utf8(bytes).ok()
}
