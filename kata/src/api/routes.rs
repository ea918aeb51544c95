//! Everything that can be asked, in one table.

use std::collections::BTreeMap;

use hyper::Method;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::Value;

use super::daemon::DaemonInfo;
use super::reply::Reply;
use super::request::Call;
use super::{blobs, daemon, metrics, mount, own, settings};
use crate::control::metrics::{AccessRecord, BackendMetrics, CacheMetrics, FsMetrics, InFlight};
use crate::control::{Control, ControlError, Events, MountRequest, operate};

/// Whether a request has a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BodyRule {
    /// It must not have one; an empty one counts as none.
    None,
    /// It must have one.
    Json,
}

/// Makes the schema of what goes over the wire.
type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// What a successful request is answered with.
#[derive(Clone, Copy)]
pub(super) enum Answer {
    /// 204.
    Nothing,
    /// 200 and JSON of this shape.
    Json(SchemaOf),
    /// 200 and text of this type.
    Text(&'static str),
}

/// One row.
#[derive(Clone, Copy)]
pub(super) struct Route {
    pub(super) method: &'static str,
    pub(super) path: &'static str,
    pub(super) body: BodyRule,
    /// May take long, and so may only use its share of the pool.
    pub(super) slow: bool,
    pub(super) handler: Handler,
    pub(super) summary: &'static str,
    /// Parameters of the query, and whether they must be there.
    pub(super) query: &'static [(&'static str, bool)],
    /// Shape of the body.
    pub(super) request: Option<SchemaOf>,
    pub(super) answer: Answer,
}

type Handler = fn(&dyn Control, &Call) -> Result<Reply, ControlError>;

impl Route {
    /// A quick request without query and body, answered with nothing.
    const fn new(method: &'static str, path: &'static str, handler: Handler, summary: &'static str) -> Self {
        Self {
            method,
            path,
            body: BodyRule::None,
            slow: false,
            handler,
            summary,
            query: &[],
            request: None,
            answer: Answer::Nothing,
        }
    }

    const fn get(path: &'static str, handler: Handler, summary: &'static str) -> Self {
        Self::new("GET", path, handler, summary)
    }

    const fn put(path: &'static str, handler: Handler, summary: &'static str) -> Self {
        Self::new("PUT", path, handler, summary)
    }

    const fn slow(self) -> Self {
        Self { slow: true, ..self }
    }

    const fn query(self, query: &'static [(&'static str, bool)]) -> Self {
        Self { query, ..self }
    }

    const fn takes(self, schema: SchemaOf) -> Self {
        Self {
            body: BodyRule::Json,
            request: Some(schema),
            ..self
        }
    }

    const fn gives(self, schema: SchemaOf) -> Self {
        Self {
            answer: Answer::Json(schema),
            ..self
        }
    }

    const fn text(self, kind: &'static str) -> Self {
        Self {
            answer: Answer::Text(kind),
            ..self
        }
    }
}

/// The schema of `T`.
fn of<T: JsonSchema>(schemas: &mut SchemaGenerator) -> Schema {
    schemas.subschema_for::<T>()
}

/// Everything. The API of the incumbent comes first, then our own. Paths are matched as they stand.
pub(super) static ROUTES: [Route; 38] = [
    Route::get(
        "/api/v1/daemon",
        daemon::info,
        "Version, id, supervisor, state, mounts",
    )
    .gives(of::<DaemonInfo>),
    Route::put("/api/v1/daemon", daemon::configure, "Change the log level")
        .takes(of::<operate::DaemonChange>),
    Route::get("/api/v1/daemon/events", daemon::events, "Errors logged lately").gives(of::<Events>),
    Route::get(
        "/api/v1/daemon/backend",
        daemon::superblock,
        "Superblock of an image",
    )
    .query(&[("mountpoint", true)])
    .gives(of::<Value>),
    Route::put(
        "/api/v1/daemon/start",
        daemon::start,
        "Start serving; refused by a daemon that runs",
    )
    .slow(),
    Route::put("/api/v1/daemon/exit", daemon::exit, "End the daemon"),
    Route::put(
        "/api/v1/daemon/fuse/sendfd",
        daemon::send_fd,
        "Hand a FUSE device over; not supported",
    ),
    Route::put(
        "/api/v1/daemon/fuse/takeover",
        daemon::take_over,
        "Take a FUSE device over; not supported",
    ),
    Route::new(
        "POST",
        "/api/v1/mount",
        mount::mount,
        "Mount an image or a directory",
    )
    .query(&[("mountpoint", true)])
    .takes(of::<MountRequest>)
    .slow(),
    Route::put("/api/v1/mount", mount::remount, "Replace an image by an image")
        .query(&[("mountpoint", true)])
        .takes(of::<MountRequest>)
        .slow(),
    Route::new("DELETE", "/api/v1/mount", mount::umount, "Unmount")
        .query(&[("mountpoint", true)])
        .slow(),
    Route::get(
        "/api/v1/config",
        settings::show,
        "Settings changed at run time, without secrets",
    )
    .query(&[("id", false)])
    .gives(of::<BTreeMap<String, String>>),
    Route::put(
        "/api/v1/config",
        settings::change,
        "Change credentials or proxy of the source of an image",
    )
    .query(&[("id", true)])
    .takes(of::<BTreeMap<String, String>>)
    .slow(),
    Route::get("/api/v1/metrics", metrics::fs, "Counters of a mount")
        .query(&[("id", false)])
        .gives(of::<FsMetrics>),
    Route::get(
        "/api/v1/metrics/files",
        metrics::files,
        "Counters by file, or what was read last",
    )
    .query(&[("id", false), ("latest", false)])
    .gives(of::<Value>),
    Route::get("/api/v1/metrics/pattern", metrics::pattern, "First accesses")
        .query(&[("id", false)])
        .gives(of::<Vec<AccessRecord>>),
    Route::get(
        "/api/v1/metrics/inflight",
        metrics::in_flight,
        "Requests that are not answered yet; 204 if there are none",
    )
    .gives(of::<Vec<InFlight>>),
    Route::get(
        "/api/v1/metrics/backend",
        metrics::backend,
        "Counters of a source",
    )
    .query(&[("id", false)])
    .gives(of::<BackendMetrics>),
    Route::get("/api/v1/metrics/blobcache", metrics::cache, "Counters of a cache")
        .query(&[("id", false)])
        .gives(of::<CacheMetrics>),
    Route::get("/api/v2/daemon", daemon::info_v2, "As version 1, without mounts").gives(of::<DaemonInfo>),
    Route::put("/api/v2/daemon", daemon::configure, "As version 1").takes(of::<operate::DaemonChange>),
    Route::get(
        "/api/v2/blobs",
        blobs::list,
        "Blob objects of fscache; not supported",
    )
    .query(&[("domain_id", true)]),
    Route::put(
        "/api/v2/blobs",
        blobs::create,
        "Blob objects of fscache; not supported",
    )
    .takes(of::<Value>),
    Route::new(
        "DELETE",
        "/api/v2/blobs",
        blobs::delete,
        "Blob objects of fscache; a blob id alone is accepted",
    )
    .query(&[("domain_id", false), ("blob_id", false)]),
    Route::get("/api/rafsd/v1/daemon", own::overview, "The daemon at this moment")
        .gives(of::<operate::Overview>),
    Route::put("/api/rafsd/v1/daemon", own::configure, "Change the log level")
        .takes(of::<operate::DaemonChange>),
    Route::get(
        "/api/rafsd/v1/mounts",
        own::mounts,
        "Mounts with state, cache policy, progress",
    )
    .query(&[("mountpoint", false)])
    .gives(of::<Vec<operate::MountStatus>>),
    Route::get(
        "/api/rafsd/v1/requests",
        own::requests,
        "Requests that are not answered yet, and what they wait for",
    )
    .gives(of::<Vec<operate::LiveRequest>>),
    Route::get("/api/rafsd/v1/latencies", own::latencies, "Latencies by mount")
        .query(&[("mountpoint", false)])
        .gives(of::<Vec<operate::MountLatencies>>),
    Route::get(
        "/api/rafsd/v1/residency",
        own::residency,
        "What of a file of an image is local",
    )
    .query(&[("mountpoint", true), ("path", true)])
    .gives(of::<operate::Residency>),
    Route::get(
        "/api/rafsd/v1/trace",
        own::trace,
        "Which chunks of an image were read first",
    )
    .query(&[("mountpoint", true)])
    .gives(of::<operate::AccessTrace>),
    Route::put(
        "/api/rafsd/v1/trace",
        own::start_trace,
        "Begin to record the first reads of an image, from nothing",
    )
    .query(&[("mountpoint", true)]),
    Route::new(
        "DELETE",
        "/api/rafsd/v1/trace",
        own::stop_trace,
        "End the recording, and keep what was recorded",
    )
    .query(&[("mountpoint", true)]),
    Route::put(
        "/api/rafsd/v1/credentials",
        own::credentials,
        "New credentials for the source of an image",
    )
    .query(&[("mountpoint", true)])
    .takes(of::<operate::NewCredentials>)
    .slow(),
    Route::put(
        "/api/rafsd/v1/drain",
        own::drain,
        "Refuse new mounts and wait for requests that wait",
    )
    .takes(of::<operate::DrainRequest>)
    .gives(of::<operate::Drained>)
    .slow(),
    Route::new("DELETE", "/api/rafsd/v1/drain", own::undrain, "Take mounts again"),
    Route::get(
        "/api/rafsd/v1/openapi.json",
        own::document,
        "This API as an OpenAPI document",
    )
    .gives(of::<Value>),
    Route::get(
        "/metrics",
        own::exposition,
        "All counters in the text format of Prometheus",
    )
    .text(super::EXPOSITION),
];

/// What the table says to a request.
pub(super) enum Found {
    /// A row.
    Route(&'static Route),
    /// The path is known, with these methods.
    WrongMethod(String),
    /// The path is unknown.
    Nothing,
}

/// Looks `method` and `path` up.
pub(super) fn find(method: &Method, path: &str) -> Found {
    let mut allowed = Vec::new();
    for route in ROUTES.iter().filter(|route| route.path == path) {
        if route.method == method.as_str() {
            return Found::Route(route);
        }
        allowed.push(route.method);
    }
    if allowed.is_empty() {
        Found::Nothing
    } else {
        Found::WrongMethod(allowed.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// `docs/api.md` promises exactly what the table holds.
    #[test]
    fn the_documentation_lists_every_route() {
        let text = include_str!("../../../docs/api.md");
        let documented: BTreeSet<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
            .filter(|request| request.contains(" /"))
            .collect();
        let routes: Vec<String> = ROUTES
            .iter()
            .map(|route| format!("{} {}", route.method, route.path))
            .collect();
        assert_eq!(documented, routes.iter().map(String::as_str).collect());
        assert_eq!(documented.len(), routes.len(), "no route stands there twice");
    }

    /// And their parameters.
    #[test]
    fn the_documentation_lists_the_parameters_of_every_query() {
        let text = include_str!("../../../docs/api.md");
        for route in &ROUTES {
            let row = format!("| `{} {}` |", route.method, route.path);
            let line = text.lines().find(|line| line.starts_with(&row)).unwrap();
            let query = line.split('|').nth(2).unwrap();
            let documented: Vec<&str> = query.split('`').skip(1).step_by(2).collect();
            let names: Vec<&str> = route.query.iter().map(|(name, _)| *name).collect();
            assert_eq!(documented, names, "{row}");
        }
    }
}
