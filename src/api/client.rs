//! The client: calls on a node over its Unix socket.
//!
//! Owns how a request becomes HTTP and an answer becomes a value or an [`Error`]. Each call uses a connection of its
//! own: on one machine that costs less than a pool is worth. Every call has a deadline; bodies that are not streams
//! have a limit, because a socket may belong to something that is no node.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::stream;
use http_body_util::{BodyExt, Empty, Full, Limited, StreamBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Bytes, Frame, Incoming},
    client::conn::http1,
    header,
};
use hyper_util::rt::TokioIo;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::UnixStream, sync::mpsc, time::timeout};

use super::{
    problem::{Code, Problem},
    types::{
        CloneVolume, CreateImage, CreateSnapshot, CreateVolume, Export, Image, Job, NodeInfo, ResizeVolume,
        RevertVolume, Snapshot, Volume,
    },
};

/// How long the socket may take to accept.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// How long an answer may take; a little more than the server gives itself.
const ANSWER_MAX: Duration = Duration::from_secs(150);
/// How long a stream may stand still.
const STREAM_IDLE_MAX: Duration = Duration::from_secs(120);
/// Bytes of an answer that is not a stream.
const ANSWER_BYTES_MAX: usize = 64 << 20;
const JSON: &str = "application/json";
const OCTETS: &str = "application/octet-stream";

/// What comes next of an upload: bytes, or `None` for its end. A sender that goes away before has not sent everything.
pub type UploadPart = io::Result<Option<Bytes>>;

/// The body of an upload, which is whole only when its end was named: a queue that merely ends says nothing of why.
fn upload_body(queue: mpsc::Receiver<UploadPart>) -> impl Body<Data = Bytes, Error = io::Error> + Send {
    StreamBody::new(stream::unfold(queue, |mut queue| async move {
        let gone = || Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the upload was given up"));
        let part = queue.recv().await.unwrap_or_else(gone).transpose()?;
        Some((part.map(Frame::data), queue))
    }))
}

/// Why a call gave no answer, or which one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no node answers on {} ({source}); start one with `bedplate serve`, or name its socket with --socket \
             or BEDPLATE_SOCKET", socket.display())]
    Unreachable { socket: PathBuf, source: io::Error },
    #[error("{}", .0.detail)]
    Refused(Box<Problem>),
    #[error("the node on {} broke off: {reason}", socket.display())]
    Broken { socket: PathBuf, reason: String },
    #[error("the node on {} did not answer within {} s", socket.display(), after.as_secs())]
    TimedOut { socket: PathBuf, after: Duration },
    #[error("write the output: {0}")]
    Output(#[source] io::Error),
}

impl Error {
    /// The stable word, where the node gave one.
    pub fn code(&self) -> Option<Code> {
        match self {
            Error::Refused(problem) => Some(problem.code),
            Error::TimedOut { .. } => Some(Code::TimedOut),
            Error::Unreachable { .. } | Error::Broken { .. } | Error::Output(_) => None,
        }
    }
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A node's address.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    pub fn new(socket: impl Into<PathBuf>) -> Client {
        Client { socket: socket.into() }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub async fn node(&self) -> Result<NodeInfo> {
        self.get(&["node"]).await
    }

    pub async fn images(&self) -> Result<Vec<Image>> {
        self.get(&["images"]).await
    }

    pub async fn image(&self, name: &str) -> Result<Image> {
        self.get(&["images", name]).await
    }

    pub async fn create_image(&self, request: &CreateImage) -> Result<Image> {
        self.post(&["images"], request).await
    }

    /// Send the bytes of an image that was created with the source `upload`. Whatever ends before the end that `parts`
    /// names breaks the upload off: an error among them, their sender, or this future.
    pub async fn upload_image(&self, name: &str, mut parts: mpsc::Receiver<UploadPart>) -> Result<Image> {
        let (to_body, queue) = mpsc::channel(1);
        let body = upload_body(queue);
        // However long the sender takes for a part, the node must take it soon.
        let feed = async move {
            while let Some(part) = parts.recv().await {
                match timeout(STREAM_IDLE_MAX, to_body.send(part)).await {
                    Ok(Ok(())) => {}
                    // The answer is there, or the connection gone; either says why.
                    Ok(Err(_)) => return Ok(()),
                    Err(_) => return Err(self.timed_out(STREAM_IDLE_MAX)),
                }
            }
            Ok(())
        };
        let path = path_of(&["images", name, "content"]);
        let mut exchange = std::pin::pin!(self.exchange(Method::POST, &path, Some(OCTETS), body));
        let response = tokio::select! {
            response = &mut exchange => response?,
            fed = feed => {
                fed?;
                timeout(ANSWER_MAX, exchange).await.map_err(|_| self.timed_out(ANSWER_MAX))??
            }
        };
        self.decode(self.whole(response).await?)
    }

    pub async fn delete_image(&self, name: &str) -> Result<()> {
        self.send(Method::DELETE, &["images", name], None).await.map(drop)
    }

    pub async fn cancel_image(&self, name: &str) -> Result<Image> {
        self.act(&["images", name, "cancel"]).await
    }

    pub async fn verify_image(&self, name: &str) -> Result<Image> {
        self.act(&["images", name, "verify"]).await
    }

    pub async fn export_image(&self, name: &str, request: &Export) -> Result<Job> {
        self.post(&["images", name, "export"], request).await
    }

    pub async fn volumes(&self) -> Result<Vec<Volume>> {
        self.get(&["volumes"]).await
    }

    pub async fn volume(&self, name: &str) -> Result<Volume> {
        self.get(&["volumes", name]).await
    }

    pub async fn create_volume(&self, request: &CreateVolume) -> Result<Volume> {
        self.post(&["volumes"], request).await
    }

    pub async fn delete_volume(&self, name: &str) -> Result<()> {
        self.send(Method::DELETE, &["volumes", name], None).await.map(drop)
    }

    pub async fn resize_volume(&self, name: &str, request: &ResizeVolume) -> Result<Volume> {
        self.post(&["volumes", name, "resize"], request).await
    }

    pub async fn clone_volume(&self, name: &str, request: &CloneVolume) -> Result<Job> {
        self.post(&["volumes", name, "clone"], request).await
    }

    pub async fn flatten_volume(&self, name: &str) -> Result<Job> {
        self.act(&["volumes", name, "flatten"]).await
    }

    pub async fn recover_volume(&self, name: &str) -> Result<Job> {
        self.act(&["volumes", name, "recover"]).await
    }

    pub async fn attach_volume(&self, name: &str) -> Result<Volume> {
        self.act(&["volumes", name, "attach"]).await
    }

    pub async fn detach_volume(&self, name: &str) -> Result<Volume> {
        self.act(&["volumes", name, "detach"]).await
    }

    pub async fn export_volume(&self, name: &str, request: &Export) -> Result<Job> {
        self.post(&["volumes", name, "export"], request).await
    }

    pub async fn snapshots(&self, volume: &str) -> Result<Vec<Snapshot>> {
        self.get(&["volumes", volume, "snapshots"]).await
    }

    pub async fn create_snapshot(&self, volume: &str, request: &CreateSnapshot) -> Result<Snapshot> {
        self.post(&["volumes", volume, "snapshots"], request).await
    }

    pub async fn delete_snapshot(&self, volume: &str, name: &str) -> Result<Job> {
        let path = ["volumes", volume, "snapshots", name];
        self.decode(self.send(Method::DELETE, &path, None).await?)
    }

    pub async fn revert_volume(
        &self,
        volume: &str,
        snapshot: &str,
        request: &RevertVolume,
    ) -> Result<Volume> {
        self.post(&["volumes", volume, "snapshots", snapshot, "revert"], request).await
    }

    pub async fn jobs(&self) -> Result<Vec<Job>> {
        self.get(&["jobs"]).await
    }

    pub async fn job(&self, id: u64) -> Result<Job> {
        self.get(&["jobs", &id.to_string()]).await
    }

    pub async fn cancel_job(&self, id: u64) -> Result<Job> {
        self.act(&["jobs", &id.to_string(), "cancel"]).await
    }

    /// Write an image's content to `out`; returns its length.
    pub async fn image_content(&self, name: &str, out: &mut dyn io::Write) -> Result<u64> {
        self.stream(&path_of(&["images", name, "content"]), out).await
    }

    /// Write the content of a volume or its snapshot to `out`; returns its length.
    pub async fn volume_content(
        &self,
        name: &str,
        snapshot: Option<&str>,
        out: &mut dyn io::Write,
    ) -> Result<u64> {
        let mut path = path_of(&["volumes", name, "content"]);
        if let Some(snapshot) = snapshot {
            path += &format!("?snapshot={}", utf8_percent_encode(snapshot, NON_ALPHANUMERIC));
        }
        self.stream(&path, out).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &[&str]) -> Result<T> {
        self.decode(self.send(Method::GET, path, None).await?)
    }

    async fn act<T: DeserializeOwned>(&self, path: &[&str]) -> Result<T> {
        self.decode(self.send(Method::POST, path, None).await?)
    }

    async fn post<T: DeserializeOwned>(&self, path: &[&str], body: &impl Serialize) -> Result<T> {
        let body = serde_json::to_vec(body).map_err(|error| self.broken(&error))?;
        self.decode(self.send(Method::POST, path, Some(body)).await?)
    }

    /// The body of a good answer; any other answer is an error.
    async fn send(&self, method: Method, path: &[&str], body: Option<Vec<u8>>) -> Result<Bytes> {
        let exchange = async {
            let media_type = body.is_some().then_some(JSON);
            let body = Full::new(Bytes::from(body.unwrap_or_default()));
            let response = self.exchange(method, &path_of(path), media_type, body).await?;
            self.whole(response).await
        };
        timeout(ANSWER_MAX, exchange).await.unwrap_or_else(|_| Err(self.timed_out(ANSWER_MAX)))
    }

    async fn stream(&self, path: &str, out: &mut dyn io::Write) -> Result<u64> {
        let response = timeout(ANSWER_MAX, self.exchange(Method::GET, path, None, Empty::<Bytes>::new()))
            .await
            .unwrap_or_else(|_| Err(self.timed_out(ANSWER_MAX)))?;
        let expected: Option<u64> =
            response.headers().get(header::CONTENT_LENGTH).and_then(|len| len.to_str().ok()?.parse().ok());
        let mut body = response.into_body();
        let mut written = 0;
        while let Some(frame) =
            timeout(STREAM_IDLE_MAX, body.frame()).await.map_err(|_| self.timed_out(STREAM_IDLE_MAX))?
        {
            let frame = frame.map_err(|error| self.broken(&error))?;
            if let Some(bytes) = frame.data_ref() {
                out.write_all(bytes).map_err(Error::Output)?;
                written += bytes.len() as u64;
            }
        }
        out.flush().map_err(Error::Output)?;
        match expected {
            Some(expected) if expected == written => Ok(written),
            _ => Err(self.broken(&"the content ended early; see the node's log")),
        }
    }

    /// Send one request; an answer that is an error becomes one.
    async fn exchange<B>(
        &self,
        method: Method,
        path: &str,
        media_type: Option<&'static str>,
        body: B,
    ) -> Result<Response<Incoming>>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let unreachable = |source| Error::Unreachable { socket: self.socket.clone(), source };
        let stream = timeout(CONNECT_MAX, UnixStream::connect(&self.socket))
            .await
            .map_err(|_| self.timed_out(CONNECT_MAX))?
            .map_err(unreachable)?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.broken(&error))?;
        // Ends with the connection, whose errors reach the caller through the answer.
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, "bedplate");
        if let Some(media_type) = media_type {
            request = request.header(header::CONTENT_TYPE, media_type);
        }
        let request = request.body(body).map_err(|error| self.broken(&error))?;
        let response = sender.send_request(request).await.map_err(|error| self.broken(&error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body = self.whole(response).await?;
        Err(match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => Error::Refused(Box::new(problem)),
            Err(_) => self.broken(&unexplained(status)),
        })
    }

    async fn whole(&self, response: Response<Incoming>) -> Result<Bytes> {
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX);
        Ok(body.collect().await.map_err(|error| self.broken(&error))?.to_bytes())
    }

    fn decode<T: DeserializeOwned>(&self, body: Bytes) -> Result<T> {
        serde_json::from_slice(&body).map_err(|error| self.broken(&error))
    }

    fn broken(&self, reason: &impl ToString) -> Error {
        Error::Broken { socket: self.socket.clone(), reason: reason.to_string() }
    }

    fn timed_out(&self, after: Duration) -> Error {
        Error::TimedOut { socket: self.socket.clone(), after }
    }
}

fn unexplained(status: StatusCode) -> String {
    format!("it answered {status} without saying why")
}

/// The path of these segments, whatever characters are in them.
fn path_of(segments: &[&str]) -> String {
    segments.iter().fold("/v1".to_owned(), |path, segment| {
        format!("{path}/{}", utf8_percent_encode(segment, NON_ALPHANUMERIC))
    })
}
