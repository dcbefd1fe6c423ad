//! Requests in, replies out: bounded in size and time, each answered on a blocking thread.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request as HttpRequest, StatusCode, header};
use axum::response::Response;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::time::Sleep;

use crate::vault::api::{Authorization, MAX_BODY, Reply, Request, Vault};
use crate::vault::drill::Delivery;
use crate::vault::identity::{HeaderSecret, TokenRequest};
use crate::vault::refusal::Refusal;

const BODY_TIMEOUT: Duration = Duration::from_secs(20);
/// What is sent before a connection is cut must have left by then.
const BEFORE_CUT: Duration = Duration::from_millis(100);
const MAX_HEADER_TEXT: usize = 256;

pub(super) async fn api_call(
    State(vault): State<Arc<Vault>>,
    ConnectInfo(client): ConnectInfo<SocketAddr>,
    request: HttpRequest<Body>,
) -> Response {
    let (parts, body) = request.into_parts();
    let body = match read_body(body).await {
        Ok(body) => body,
        Err(refusal) => {
            // The rest of the body is not read: nothing can follow it on this connection.
            let mut response = refused(&refusal);
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            return response;
        }
    };
    // An absolute request target names the host; else the header does.
    let host = parts
        .uri
        .authority()
        .map(|authority| authority.as_str().to_owned())
        .or_else(|| text(&parts.headers, &header::HOST))
        .unwrap_or_default();
    let short =
        |name: &HeaderName| text(&parts.headers, name).filter(|text| text.len() <= MAX_HEADER_TEXT);
    let request = Request {
        method: parts.method.as_str().to_owned(),
        path: parts.uri.path().to_owned(),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        host,
        authorization: text(&parts.headers, &header::AUTHORIZATION).map(Authorization),
        client_request_id: short(&HeaderName::from_static("x-ms-client-request-id")),
        user_agent: short(&header::USER_AGENT),
        client: Some(client.ip().to_canonical()),
        body,
    };
    answer(move || vault.handle(&request)).await
}

pub(super) async fn token_call(
    State(vault): State<Arc<Vault>>,
    ConnectInfo(client): ConnectInfo<SocketAddr>,
    request: HttpRequest<Body>,
) -> Response {
    let (parts, body) = request.into_parts();
    let body = match read_body(body).await {
        Ok(body) => body,
        Err(refusal) => return refused(&refusal),
    };
    let named = |name: &'static str| text(&parts.headers, &HeaderName::from_static(name));
    let request = TokenRequest {
        method: parts.method.as_str().to_owned(),
        path: parts.uri.path().to_owned(),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        header: named("x-identity-header").map(HeaderSecret),
        metadata: named("metadata").is_some_and(|value| value.eq_ignore_ascii_case("true")),
        forwarded: parts.headers.contains_key("x-forwarded-for"),
        client: client.ip(),
    };
    answer(move || vault.drill_control(&request, &body).unwrap_or_else(|| vault.token(&request)))
        .await
}

async fn answer(work: impl FnOnce() -> Reply + Send + 'static) -> Response {
    match tokio::task::spawn_blocking(work).await {
        Ok(reply) => deliver(reply).await,
        Err(error) => {
            log::error!("a request failed: {error}");
            refused(&Refusal::internal())
        }
    }
}

async fn read_body(body: Body) -> Result<Vec<u8>, Refusal> {
    match tokio::time::timeout(BODY_TIMEOUT, axum::body::to_bytes(body, MAX_BODY)).await {
        Ok(Ok(bytes)) => Ok(bytes.into()),
        Ok(Err(_)) => Err(Refusal::new(
            413,
            "RequestEntityTooLarge",
            "The request body was cut off or is too large.",
        )),
        Err(_) => Err(Refusal::new(408, "RequestTimeout", "The request body came too slowly.")),
    }
}

fn text(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

fn refused(refusal: &Refusal) -> Response {
    response(Reply::json(refusal.status, &refusal.body()))
}

async fn deliver(reply: Reply) -> Response {
    let Delivery { delay, hang, .. } = reply.delivery;
    if hang {
        std::future::pending::<()>().await;
    }
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    response(reply)
}

fn response(reply: Reply) -> Response {
    let delivery = reply.delivery;
    let plain = delivery == Delivery { delay: delivery.delay, ..Delivery::default() };
    let body = match reply.body {
        None if plain => Body::empty(),
        Some(bytes) if plain => Body::from(bytes),
        bytes => Body::new(ShapedBody::new(bytes.unwrap_or_default().into(), &delivery)),
    };
    let mut response = Response::new(body);
    *response.status_mut() =
        StatusCode::from_u16(reply.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    for (name, value) in reply.headers {
        match HeaderValue::from_str(&value) {
            Ok(value) => {
                response.headers_mut().insert(HeaderName::from_static(name), value);
            }
            Err(_) => log::error!("the header {name} has no valid value"),
        }
    }
    response
}

/// A body that a drill sends slowly or not to its end. Its length is promised whole.
struct ShapedBody {
    bytes: Bytes,
    sent: usize,
    /// Where the connection is cut.
    end: Option<usize>,
    pause: Option<Duration>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl ShapedBody {
    fn new(bytes: Bytes, delivery: &Delivery) -> ShapedBody {
        let end = if delivery.close { Some(0) } else { delivery.truncate };
        let end = end.map(|end| end.min(bytes.len()));
        ShapedBody { bytes, sent: 0, end, pause: delivery.trickle, timer: None }
    }

    fn wait(&mut self, context: &mut Context<'_>, time: Duration) -> Poll<()> {
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(time)));
        let waited = timer.as_mut().poll(context);
        if waited.is_ready() {
            self.timer = None;
        }
        waited
    }
}

impl http_body::Body for ShapedBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        let end = self.end.unwrap_or(self.bytes.len());
        if self.sent >= end {
            if self.end.is_none() {
                return Poll::Ready(None);
            }
            if end > 0 && self.wait(context, BEFORE_CUT).is_pending() {
                return Poll::Pending;
            }
            return Poll::Ready(Some(Err(std::io::Error::other("cut off by a drill"))));
        }
        let next = match self.pause {
            None => end,
            Some(pause) => {
                if self.wait(context, pause).is_pending() {
                    return Poll::Pending;
                }
                self.sent + 1
            }
        };
        let frame = self.bytes.slice(self.sent..next);
        self.sent = next;
        Poll::Ready(Some(Ok(Frame::data(frame))))
    }

    fn is_end_stream(&self) -> bool {
        self.end.is_none() && self.sent >= self.bytes.len()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact((self.bytes.len() - self.sent) as u64)
    }
}
