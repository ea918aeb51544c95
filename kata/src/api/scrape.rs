//! Counters over TCP, for Prometheus. Nothing else can be asked there.

use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::{Semaphore, watch};

use super::EXPOSITION;
use super::reply::{Body, Reply};
use crate::control::{Control, ControlError};

/// Scrapers at a time; further ones wait.
const SCRAPERS: usize = 16;

/// How long a scraper may take to say what it wants; afterwards it is gone.
const PATIENCE: Duration = Duration::from_secs(30);

/// A listener that answers `GET /metrics`. Dropping it ends it.
pub struct Scrape {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Scrape {
    /// Serves the counters of `control` on `listener`.
    ///
    /// # Errors
    ///
    /// The runtime or its thread could not be made.
    pub fn start(listener: TcpListener, control: Arc<dyn Control>) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let listener = {
            let _guard = runtime.enter();
            tokio::net::TcpListener::from_std(listener)?
        };
        let (stop, mut stopped) = watch::channel(false);
        let thread = std::thread::Builder::new().name("scrape".into()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = serve(listener, control) => {}
                    () = super::told_to_stop(&mut stopped) => {}
                }
            });
            runtime.shutdown_background();
        })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Scrape {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(listener: tokio::net::TcpListener, control: Arc<dyn Control>) {
    let room = Arc::new(Semaphore::new(SCRAPERS));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("metrics: accept: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let control = Arc::clone(&control);
        tokio::spawn(async move {
            let service = hyper::service::service_fn(move |request| answer(Arc::clone(&control), request));
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!("metrics: connection ended: {error}");
            }
            drop(permit);
        });
    }
}

async fn answer(control: Arc<dyn Control>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path();
    let reply = if request.method() != Method::GET {
        Reply::wrong_method(request.method(), "GET".to_owned())
    } else if path != "/metrics" {
        Reply::from(ControlError {
            status: 404,
            message: format!("NoRoute: there is no {path}, only /metrics"),
        })
    } else {
        let text = tokio::task::spawn_blocking(move || control.exposition()).await;
        Reply::text(text.unwrap_or_default(), EXPOSITION)
    };
    Ok(reply.into_response(false))
}
