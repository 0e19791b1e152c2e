//! The server: its limits, and how it stops.
//!
//! Owns every bound on what clients may do at once; the socket's file is [`super::socket`]'s. A connection that sends
//! nothing is closed after `IDLE_MAX`, a request that is not answered within `ANSWER_MAX` is answered *timed out* while
//! its work goes on (an upload takes as long as its body). Stopping answers what is in work, and refuses
//! the rest.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::{DefaultBodyLimit, MatchedPath, Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{net::UnixStream, sync::Semaphore, task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{
    problem::{Code, Refusal},
    routes::{self, Context},
    socket::Listener,
};

/// Open connections; one more waits until another is closed.
pub const CONNECTIONS_MAX: usize = 128;
/// Requests in work at once; one more is refused as busy.
pub const REQUESTS_MAX: usize = 64;
/// Bytes of a request's body.
pub const BODY_BYTES_MAX: usize = 64 << 10;
/// How long a connection may be silent before it sends a request.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// How long a request may take until it is answered; a body that is streamed may take longer.
const ANSWER_MAX: Duration = Duration::from_secs(120);
/// Pause after the system refused a connection (no descriptors left), so that the refusal is not a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serve until `stop` is cancelled; then answer what is in work, for `grace` at most.
pub async fn serve(listener: Listener, context: Context, stop: CancellationToken, grace: Duration) {
    let app = app(context);
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &permits) => accepted,
            Some(_) = connections.join_next() => continue,
            () = stop.cancelled() => break,
        };
        match accepted {
            Ok((stream, permit)) => {
                let (app, stop) = (app.clone(), stop.clone());
                connections.spawn(async move {
                    converse(stream, app, stop).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    let drained = timeout(grace, async { while connections.join_next().await.is_some() {} }).await;
    if drained.is_err() {
        tracing::warn!(left = connections.len(), "connections are cut: their requests did not end in time");
    }
}

async fn accept(
    listener: &Listener,
    permits: &Arc<Semaphore>,
) -> io::Result<(UnixStream, tokio::sync::OwnedSemaphorePermit)> {
    let permit = permits.clone().acquire_owned().await.map_err(io::Error::other)?;
    let stream = listener.accept().await?;
    Ok((stream, permit))
}

/// One connection, until its client or `stop` ends it.
async fn converse(stream: UnixStream, app: Router, stop: CancellationToken) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_MAX)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
    let mut connection = std::pin::pin!(connection);
    let result = match stop.run_until_cancelled(connection.as_mut()).await {
        Some(result) => result,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        // A client that goes away in the middle is its own affair.
        tracing::debug!(%error, "a connection ended");
    }
}

/// The routes within their limits.
fn app(context: Context) -> Router {
    let limits = Limits { requests: Arc::new(Semaphore::new(REQUESTS_MAX)), context: context.clone() };
    routes::router(context)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn_with_state(limits, within_limits))
}

#[derive(Clone)]
struct Limits {
    requests: Arc<Semaphore>,
    context: Context,
}

/// Bound the number of requests in work and the time of each, and count them.
async fn within_limits(State(limits): State<Limits>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map_or("unknown", MatchedPath::as_str).to_owned();
    let response = match limits.requests.try_acquire() {
        Err(_) => {
            Refusal::new(Code::Busy, "too many requests at once (REQUESTS_MAX); try again").into_response()
        }
        // Its bytes come as fast as their sender and the disk allow; the job that takes them has the deadline.
        Ok(_permit) if (&method, route.as_str()) == (&routes::UPLOAD.0, routes::UPLOAD.1) => {
            next.run(request).await
        }
        Ok(_permit) => match timeout(ANSWER_MAX, next.run(request)).await {
            Ok(response) => response,
            Err(_) => {
                let detail = format!("no answer within {} s; the work goes on", ANSWER_MAX.as_secs());
                Refusal::new(Code::TimedOut, detail).into_response()
            }
        },
    };
    limits.context.metrics.request(method.as_str(), &route, response.status().as_u16(), began.elapsed());
    response
}
