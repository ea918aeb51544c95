//! The HTTP server on the API socket.
//!
//! One thread runs the connections; every request is answered by its handler on a thread of a pool, so
//! that a mount that takes its time delays nobody. At most [`SLOW_AT_A_TIME`] slow requests run at once,
//! which leaves the pool room for quick ones.
//!
//! A connection is never closed from here while its client keeps it open: a silent connection is how the
//! snapshotter learns that the daemon lives.
//!
//! Rooms: `routes` (the table of everything that can be asked), `request` (query and body), `reply`
//! (answers), `daemon`, `mount`, `settings`, `metrics`, `blobs` (the handlers of the incumbent's API), `own` (those of ours),
//! `openapi` (the table as a document), `scrape` (counters over TCP).

mod blobs;
mod daemon;
mod metrics;
mod mount;
mod openapi;
mod own;
mod reply;
mod request;
mod routes;
mod scrape;
mod settings;

use std::convert::Infallible;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::control::{Control, ControlError};
use reply::{Body, Reply};
use request::Call;
use routes::Found;
pub use scrape::Scrape;

/// Type of the counters in the text format of Prometheus.
const EXPOSITION: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Where our own API begins; its errors have codes of their own.
const OWN: &str = "/api/rafsd/";

/// Connections at a time; one more is told so and closed.
pub const MAX_CONNECTIONS: usize = 1024;

/// Mounts, remounts and unmounts that run at once; further ones wait.
pub const SLOW_AT_A_TIME: usize = 64;

/// Threads for handlers.
const POOL: usize = SLOW_AT_A_TIME + 64;

/// How long answers under way may take to leave when the server stops.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// A running server. Dropping it stops it like [`Server::stop`].
pub struct Server {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `control` on `listener`.
    ///
    /// # Errors
    ///
    /// The runtime or its thread could not be made.
    pub fn start(listener: UnixListener, control: Arc<dyn Control>) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(POOL)
            .thread_name("api-worker")
            .build()?;
        let listener = {
            let _guard = runtime.enter();
            tokio::net::UnixListener::from_std(listener)?
        };
        let (stop, stopped) = watch::channel(false);
        let thread = std::thread::Builder::new().name("api".into()).spawn(move || {
            runtime.block_on(serve(listener, control, stopped));
            // A handler that still runs must not hold up the end of the daemon.
            runtime.shutdown_background();
        })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    /// Accepts no more connections, lets answers under way leave for a moment, and closes all.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            // The thread only ends early if the runtime panicked, and then there is nothing left to stop.
            let _ = thread.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// What the connections share.
struct Shared {
    control: Arc<dyn Control>,
    slow: Semaphore,
}

async fn serve(
    listener: tokio::net::UnixListener,
    control: Arc<dyn Control>,
    mut stopped: watch::Receiver<bool>,
) {
    let shared = Arc::new(Shared {
        control,
        slow: Semaphore::new(SLOW_AT_A_TIME),
    });
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = told_to_stop(&mut stopped) => break,
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            Ok((stream, _)) if connections.len() < MAX_CONNECTIONS => {
                connections.spawn(serve_connection(stream, shared.clone(), stopped.clone()));
            }
            Ok((stream, _)) => refuse_connection(stream).await,
            Err(error) => {
                // Out of descriptors, most likely: others must be closed first.
                tracing::warn!("API socket: accept: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    drop(listener);
    let all_closed = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(LAST_WORDS, all_closed).await.is_err() {
        tracing::debug!("API socket: closing connections that are still busy");
    }
}

/// Waits for the word to stop, or for the end of those who could say it.
async fn told_to_stop(stopped: &mut watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stop| *stop).await;
}

async fn refuse_connection(mut stream: UnixStream) {
    let text = reply::too_many_connections();
    // The client may already be gone, or not read: neither is worth waiting for.
    let _ = tokio::time::timeout(Duration::from_millis(50), stream.write_all(text.as_bytes())).await;
}

async fn serve_connection(stream: UnixStream, shared: Arc<Shared>, mut stopped: watch::Receiver<bool>) {
    let service = hyper::service::service_fn(move |request| answer(shared.clone(), request));
    let connection = hyper::server::conn::http1::Builder::new()
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        () = told_to_stop(&mut stopped) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!("API socket: connection ended: {error}");
    }
}

async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let head_only = request.method() == hyper::Method::HEAD;
    let own = request.uri().path().starts_with(OWN);
    let reply = match handle(&shared, request).await {
        Ok(reply) => reply,
        Err(error) => {
            tracing::debug!("API request refused: {} {}", error.status, error.message);
            let message = error.message.clone();
            match (Reply::from(error), own) {
                (reply, true) => reply.with_own_codes(&message),
                (reply, false) => reply,
            }
        }
    };
    Ok(reply.into_response(head_only))
}

async fn handle(shared: &Shared, request: Request<Incoming>) -> Result<Reply, ControlError> {
    let route = match routes::find(request.method(), request.uri().path()) {
        Found::Route(route) => route,
        Found::WrongMethod(allowed) => return Ok(Reply::wrong_method(request.method(), allowed)),
        Found::Nothing => {
            return Err(ControlError {
                status: 404,
                message: format!("NoRoute: there is no {}", request.uri().path()),
            });
        }
    };
    let call = Call::read(request, route.body).await?;
    let permit = match route.slow {
        true => shared.slow.acquire().await.ok(),
        false => None,
    };
    let control = shared.control.clone();
    let outcome = tokio::task::spawn_blocking(move || (route.handler)(&*control, &call)).await;
    drop(permit);
    outcome.unwrap_or_else(|_| {
        tracing::error!("handler of {} {} panicked", route.method, route.path);
        Err(ControlError::failed(format!(
            "internal error in {} {}",
            route.method, route.path
        )))
    })
}
