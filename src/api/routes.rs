//! The routes: HTTP in, a call on the [`Node`], JSON or a problem document out.
//!
//! Owns paths, methods and status codes, and with them the OpenAPI document, which is made from the same annotations.
//! Decides nothing about images or volumes. Calls on the node run where blocking is allowed; a job that ends within
//! `JOB_GRACE` is answered as ended, so that short ones need no second request.

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{
        FromRequest, FromRequestParts, Path, State,
        rejection::{JsonRejection, QueryRejection},
    },
    http::{Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use utoipa::OpenApi;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    content,
    node::{Node, Origin, Readiness},
    problem::{Code, Problem, Refusal},
    types::{
        CloneVolume, ContentQuery, CreateImage, CreateSnapshot, CreateVolume, Export, Image, Job, JobState,
        NodeInfo, ResizeVolume, RevertVolume, Snapshot, Volume,
    },
};
use crate::telemetry::Metrics;

/// How long a request waits for its job before it answers that the job is running.
const JOB_GRACE: Duration = Duration::from_millis(250);

/// The one route whose request takes as long as its body does.
pub const UPLOAD: (Method, &str) = (Method::POST, "/v1/images/{name}/content");

/// What every route has at hand.
#[derive(Clone)]
pub struct Context {
    pub node: Arc<dyn Node>,
    pub metrics: Arc<Metrics>,
}

type Reply<T> = Result<T, Refusal>;

/// JSON in the body, refused by a problem document.
#[derive(FromRequest)]
#[from_request(via(Json), rejection(Refusal))]
struct Body<T>(T);

/// Parameters after the question mark, refused by a problem document.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(Refusal))]
struct Query<T>(T);

impl From<JsonRejection> for Refusal {
    fn from(rejection: JsonRejection) -> Refusal {
        let code = match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => Code::TooLarge,
            _ => Code::Invalid,
        };
        Refusal::new(code, rejection.body_text())
    }
}

impl From<QueryRejection> for Refusal {
    fn from(rejection: QueryRejection) -> Refusal {
        Refusal::new(Code::Invalid, rejection.body_text())
    }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Bedplate",
        description = "The HTTP API of a Bedplate node, on its Unix socket. Errors are RFC 9457 problem documents; \
                       match on their `code`."
    ),
    components(schemas(Problem, Code))
)]
struct Document;

/// The routes and the document that describes them.
pub fn router(context: Context) -> Router {
    let (router, document) = OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(healthz))
        .routes(routes!(livez))
        .routes(routes!(readyz))
        .routes(routes!(metrics))
        .routes(routes!(node_info))
        .routes(routes!(list_images, create_image))
        .routes(routes!(get_image, delete_image))
        .routes(routes!(cancel_image))
        .routes(routes!(verify_image))
        .routes(routes!(export_image))
        .routes(routes!(image_content, upload_image))
        .routes(routes!(list_volumes, create_volume))
        .routes(routes!(get_volume, delete_volume))
        .routes(routes!(resize_volume))
        .routes(routes!(clone_volume))
        .routes(routes!(flatten_volume))
        .routes(routes!(recover_volume))
        .routes(routes!(attach_volume))
        .routes(routes!(detach_volume))
        .routes(routes!(export_volume))
        .routes(routes!(volume_content))
        .routes(routes!(list_snapshots, create_snapshot))
        .routes(routes!(delete_snapshot))
        .routes(routes!(revert_volume))
        .routes(routes!(list_jobs))
        .routes(routes!(get_job))
        .routes(routes!(cancel_job))
        .split_for_parts();
    let document = Arc::new(document);
    router
        .route(
            "/openapi.json",
            axum::routing::get(move || {
                let document = document.clone();
                async move { Json(document.as_ref().clone()) }
            }),
        )
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .with_state(context)
}

async fn no_such_route(uri: axum::http::Uri) -> Refusal {
    Refusal::new(Code::NoSuchRoute, format!("{} is not a path of this API; see /openapi.json", uri.path()))
}

async fn no_such_method(method: axum::http::Method, uri: axum::http::Uri) -> Refusal {
    Refusal::new(Code::NoSuchRoute, format!("{} does not take {method}; see /openapi.json", uri.path()))
}

/// Run a call on the node where blocking is allowed. A caller that goes away does not stop it half way.
async fn call<T: Send + 'static>(
    context: Context,
    work: impl FnOnce(&dyn Node) -> Reply<T> + Send + 'static,
) -> Reply<T> {
    match tokio::task::spawn_blocking(move || work(context.node.as_ref())).await {
        Ok(reply) => reply,
        Err(error) => {
            tracing::error!(%error, "a request ended without an answer");
            Err(Refusal::new(Code::Internal, "the request ended without an answer; see the node's log"))
        }
    }
}

/// Start a job and give it a moment to end: 200 when it has, 202 while it runs.
async fn start(
    context: Context,
    work: impl FnOnce(&dyn Node) -> Reply<Job> + Send + 'static,
) -> Reply<(StatusCode, Json<Job>)> {
    let job = call(context, move |node| {
        let job = work(node)?;
        node.wait_job(job.id, JOB_GRACE)
    })
    .await?;
    let status = match job.state {
        JobState::Running => StatusCode::ACCEPTED,
        JobState::Done | JobState::Failed => StatusCode::OK,
    };
    Ok((status, Json(job)))
}

/// The process answers.
#[utoipa::path(get, path = "/healthz", tag = "node", responses((status = 200, description = "It does")))]
async fn healthz() -> &'static str {
    "ok\n"
}

/// The process answers.
#[utoipa::path(get, path = "/livez", tag = "node", responses((status = 200, description = "It does")))]
async fn livez() -> &'static str {
    "ok\n"
}

/// The node takes requests and its mount is served.
#[utoipa::path(get, path = "/readyz", tag = "node",
    responses((status = 200, description = "It is ready"), (status = 503, body = Problem)))]
async fn readyz(State(context): State<Context>) -> Reply<&'static str> {
    call(context, |node| match node.readiness() {
        Readiness::Ready => Ok("ok\n"),
        Readiness::NotReady(why) => Err(Refusal::new(Code::ShuttingDown, why)),
    })
    .await
}

/// Figures in the OpenMetrics text form, which Prometheus reads.
#[utoipa::path(get, path = "/metrics", tag = "node", responses((status = 200, content_type = "text/plain")))]
async fn metrics(State(context): State<Context>) -> Reply<Response> {
    let metrics = context.metrics.clone();
    let text =
        call(context, move |node| Ok(metrics.render(&node.info(), &node.images(), &node.volumes()))).await?;
    Ok(([(header::CONTENT_TYPE, Metrics::MEDIA_TYPE)], text).into_response())
}

/// The node and its disks.
#[utoipa::path(get, path = "/v1/node", tag = "node", responses((status = 200, body = NodeInfo)))]
async fn node_info(State(context): State<Context>) -> Reply<Json<NodeInfo>> {
    call(context, |node| Ok(Json(node.info()))).await
}

/// All images.
#[utoipa::path(get, path = "/v1/images", tag = "images", responses((status = 200, body = [Image])))]
async fn list_images(State(context): State<Context>) -> Reply<Json<Vec<Image>>> {
    call(context, |node| Ok(Json(node.images()))).await
}

/// Begin an image.
#[utoipa::path(post, path = "/v1/images", tag = "images", request_body = CreateImage,
    responses((status = 201, body = Image), (status = "default", body = Problem)))]
async fn create_image(
    State(context): State<Context>,
    Body(request): Body<CreateImage>,
) -> Reply<(StatusCode, Json<Image>)> {
    call(context, |node| Ok((StatusCode::CREATED, Json(node.create_image(request)?)))).await
}

/// One image.
#[utoipa::path(get, path = "/v1/images/{name}", tag = "images",
    responses((status = 200, body = Image), (status = "default", body = Problem)))]
async fn get_image(State(context): State<Context>, Path(name): Path<String>) -> Reply<Json<Image>> {
    call(context, move |node| Ok(Json(node.image(&name)?))).await
}

/// Delete an image; one in progress is cancelled first.
#[utoipa::path(delete, path = "/v1/images/{name}", tag = "images",
    responses((status = 204), (status = "default", body = Problem)))]
async fn delete_image(State(context): State<Context>, Path(name): Path<String>) -> Reply<StatusCode> {
    call(context, move |node| node.delete_image(&name).map(|()| StatusCode::NO_CONTENT)).await
}

/// End the job that makes an image.
#[utoipa::path(post, path = "/v1/images/{name}/cancel", tag = "images",
    responses((status = 200, body = Image), (status = "default", body = Problem)))]
async fn cancel_image(State(context): State<Context>, Path(name): Path<String>) -> Reply<Json<Image>> {
    call(context, move |node| Ok(Json(node.cancel_image(&name)?))).await
}

/// Begin to read an image back from the medium; it has progress until that ends.
#[utoipa::path(post, path = "/v1/images/{name}/verify", tag = "images",
    responses((status = 200, body = Image), (status = "default", body = Problem)))]
async fn verify_image(State(context): State<Context>, Path(name): Path<String>) -> Reply<Json<Image>> {
    call(context, move |node| Ok(Json(node.verify_image(&name)?))).await
}

/// Write an image into a file of the node's machine.
#[utoipa::path(post, path = "/v1/images/{name}/export", tag = "images", request_body = Export,
    responses((status = 200, body = Job), (status = 202, body = Job), (status = "default", body = Problem)))]
async fn export_image(
    State(context): State<Context>,
    Path(name): Path<String>,
    Body(request): Body<Export>,
) -> Reply<(StatusCode, Json<Job>)> {
    start(context, move |node| node.export(Origin::Image(name), request)).await
}

/// An image's content, decoded to raw.
#[utoipa::path(get, path = "/v1/images/{name}/content", tag = "images",
    responses((status = 200, content_type = "application/octet-stream"), (status = "default", body = Problem)))]
async fn image_content(State(context): State<Context>, Path(name): Path<String>) -> Reply<Response> {
    let device = call(context, move |node| node.content(Origin::Image(name))).await?;
    Ok(content::response(device))
}

/// Send the bytes of an image that was created with the source `upload`. Answered when they have been taken over, with
/// the image as it is then: its state tells whether it is good.
#[utoipa::path(post, path = "/v1/images/{name}/content", tag = "images",
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 202, body = Image), (status = "default", body = Problem)))]
async fn upload_image(
    State(context): State<Context>,
    Path(name): Path<String>,
    body: axum::body::Body,
) -> Reply<(StatusCode, Json<Image>)> {
    let image = name.clone();
    let parts = call(context.clone(), move |node| node.upload_image(&image)).await?;
    content::receive(body, parts).await?;
    call(context, move |node| Ok((StatusCode::ACCEPTED, Json(node.image(&name)?)))).await
}

/// All volumes.
#[utoipa::path(get, path = "/v1/volumes", tag = "volumes", responses((status = 200, body = [Volume])))]
async fn list_volumes(State(context): State<Context>) -> Reply<Json<Vec<Volume>>> {
    call(context, |node| Ok(Json(node.volumes()))).await
}

/// Make a volume.
#[utoipa::path(post, path = "/v1/volumes", tag = "volumes", request_body = CreateVolume,
    responses((status = 201, body = Volume), (status = "default", body = Problem)))]
async fn create_volume(
    State(context): State<Context>,
    Body(request): Body<CreateVolume>,
) -> Reply<(StatusCode, Json<Volume>)> {
    call(context, |node| Ok((StatusCode::CREATED, Json(node.create_volume(request)?)))).await
}

/// One volume.
#[utoipa::path(get, path = "/v1/volumes/{name}", tag = "volumes",
    responses((status = 200, body = Volume), (status = "default", body = Problem)))]
async fn get_volume(State(context): State<Context>, Path(name): Path<String>) -> Reply<Json<Volume>> {
    call(context, move |node| Ok(Json(node.volume(&name)?))).await
}

/// Delete a volume with its snapshots; clones of it stay.
#[utoipa::path(delete, path = "/v1/volumes/{name}", tag = "volumes",
    responses((status = 204), (status = "default", body = Problem)))]
async fn delete_volume(State(context): State<Context>, Path(name): Path<String>) -> Reply<StatusCode> {
    call(context, move |node| node.delete_volume(&name).map(|()| StatusCode::NO_CONTENT)).await
}

/// Grow a volume.
#[utoipa::path(post, path = "/v1/volumes/{name}/resize", tag = "volumes", request_body = ResizeVolume,
    responses((status = 200, body = Volume), (status = "default", body = Problem)))]
async fn resize_volume(
    State(context): State<Context>,
    Path(name): Path<String>,
    Body(request): Body<ResizeVolume>,
) -> Reply<Json<Volume>> {
    call(context, move |node| Ok(Json(node.resize_volume(&name, request)?))).await
}

/// Make a volume that begins as this one or a snapshot of it.
#[utoipa::path(post, path = "/v1/volumes/{name}/clone", tag = "volumes", request_body = CloneVolume,
    responses((status = 200, body = Job), (status = 202, body = Job), (status = "default", body = Problem)))]
async fn clone_volume(
    State(context): State<Context>,
    Path(name): Path<String>,
    Body(request): Body<CloneVolume>,
) -> Reply<(StatusCode, Json<Job>)> {
    start(context, move |node| node.clone_volume(&name, request)).await
}

/// Copy what a volume still reads from its image, so that it needs the image no more.
#[utoipa::path(post, path = "/v1/volumes/{name}/flatten", tag = "volumes",
    responses((status = 200, body = Job), (status = 202, body = Job), (status = "default", body = Problem)))]
async fn flatten_volume(
    State(context): State<Context>,
    Path(name): Path<String>,
) -> Reply<(StatusCode, Json<Job>)> {
    start(context, move |node| node.flatten_volume(&name)).await
}

/// Make a volume writable again after a fault; the job's report says what was lost.
#[utoipa::path(post, path = "/v1/volumes/{name}/recover", tag = "volumes",
    responses((status = 200, body = Job), (status = 202, body = Job), (status = "default", body = Problem)))]
async fn recover_volume(
    State(context): State<Context>,
    Path(name): Path<String>,
) -> Reply<(StatusCode, Json<Job>)> {
    start(context, move |node| node.recover_volume(&name)).await
}

/// Give a volume a loop device; it keeps the one that it has.
#[utoipa::path(post, path = "/v1/volumes/{name}/attach", tag = "volumes",
    responses((status = 200, body = Volume), (status = "default", body = Problem)))]
async fn attach_volume(State(context): State<Context>, Path(name): Path<String>) -> Reply<Json<Volume>> {
    call(context, move |node| Ok(Json(node.attach_volume(&name)?))).await
}

/// Take a volume's loop device away.
#[utoipa::path(post, path = "/v1/volumes/{name}/detach", tag = "volumes",
    responses((status = 200, body = Volume), (status = "default", body = Problem)))]
async fn detach_volume(State(context): State<Context>, Path(name): Path<String>) -> Reply<Json<Volume>> {
    call(context, move |node| Ok(Json(node.detach_volume(&name)?))).await
}

/// Write a volume or a snapshot of it into a file of the node's machine.
#[utoipa::path(post, path = "/v1/volumes/{name}/export", tag = "volumes", request_body = Export,
    responses((status = 200, body = Job), (status = 202, body = Job), (status = "default", body = Problem)))]
async fn export_volume(
    State(context): State<Context>,
    Path(name): Path<String>,
    Body(mut request): Body<Export>,
) -> Reply<(StatusCode, Json<Job>)> {
    let origin = Origin::Volume { name, snapshot: request.snapshot.take() };
    start(context, move |node| node.export(origin, request)).await
}

/// The content of a volume or of a snapshot of it.
#[utoipa::path(get, path = "/v1/volumes/{name}/content", tag = "volumes", params(ContentQuery),
    responses((status = 200, content_type = "application/octet-stream"), (status = "default", body = Problem)))]
async fn volume_content(
    State(context): State<Context>,
    Path(name): Path<String>,
    Query(query): Query<ContentQuery>,
) -> Reply<Response> {
    let origin = Origin::Volume { name, snapshot: query.snapshot };
    let device = call(context, move |node| node.content(origin)).await?;
    Ok(content::response(device))
}

/// A volume's snapshots, oldest first.
#[utoipa::path(get, path = "/v1/volumes/{name}/snapshots", tag = "snapshots",
    responses((status = 200, body = [Snapshot]), (status = "default", body = Problem)))]
async fn list_snapshots(
    State(context): State<Context>,
    Path(name): Path<String>,
) -> Reply<Json<Vec<Snapshot>>> {
    call(context, move |node| Ok(Json(node.snapshots(&name)?))).await
}

/// Take a snapshot: every write acknowledged before the call is in it.
#[utoipa::path(post, path = "/v1/volumes/{name}/snapshots", tag = "snapshots", request_body = CreateSnapshot,
    responses((status = 201, body = Snapshot), (status = "default", body = Problem)))]
async fn create_snapshot(
    State(context): State<Context>,
    Path(name): Path<String>,
    Body(request): Body<CreateSnapshot>,
) -> Reply<(StatusCode, Json<Snapshot>)> {
    call(context, move |node| Ok((StatusCode::CREATED, Json(node.create_snapshot(&name, request)?)))).await
}

/// Delete a snapshot; what only it holds is given back.
#[utoipa::path(delete, path = "/v1/volumes/{name}/snapshots/{snapshot}", tag = "snapshots",
    responses((status = 200, body = Job), (status = 202, body = Job), (status = "default", body = Problem)))]
async fn delete_snapshot(
    State(context): State<Context>,
    Path((name, snapshot)): Path<(String, String)>,
) -> Reply<(StatusCode, Json<Job>)> {
    start(context, move |node| node.delete_snapshot(&name, &snapshot)).await
}

/// Go back to a snapshot; every snapshot stays.
#[utoipa::path(post, path = "/v1/volumes/{name}/snapshots/{snapshot}/revert", tag = "snapshots",
    request_body = RevertVolume, responses((status = 200, body = Volume), (status = "default", body = Problem)))]
async fn revert_volume(
    State(context): State<Context>,
    Path((name, snapshot)): Path<(String, String)>,
    Body(request): Body<RevertVolume>,
) -> Reply<Json<Volume>> {
    call(context, move |node| Ok(Json(node.revert_volume(&name, &snapshot, request)?))).await
}

/// Running jobs, and those that ended a while ago.
#[utoipa::path(get, path = "/v1/jobs", tag = "jobs", responses((status = 200, body = [Job])))]
async fn list_jobs(State(context): State<Context>) -> Reply<Json<Vec<Job>>> {
    call(context, |node| Ok(Json(node.jobs()))).await
}

/// One job.
#[utoipa::path(get, path = "/v1/jobs/{id}", tag = "jobs",
    responses((status = 200, body = Job), (status = "default", body = Problem)))]
async fn get_job(State(context): State<Context>, Path(id): Path<String>) -> Reply<Json<Job>> {
    let id = job_id(&id)?;
    call(context, move |node| Ok(Json(node.job(id)?))).await
}

/// Tell a job to stop. It then fails as cancelled; what it had made is taken away, or used when it is done again.
#[utoipa::path(post, path = "/v1/jobs/{id}/cancel", tag = "jobs",
    responses((status = 200, body = Job), (status = 202, body = Job), (status = "default", body = Problem)))]
async fn cancel_job(
    State(context): State<Context>,
    Path(id): Path<String>,
) -> Reply<(StatusCode, Json<Job>)> {
    let id = job_id(&id)?;
    start(context, move |node| {
        node.cancel_job(id)?;
        node.job(id)
    })
    .await
}

fn job_id(text: &str) -> Reply<u64> {
    text.parse().map_err(|_| Refusal::new(Code::NotFound, format!("job {text:?} not found")))
}
