//! Everything that can be asked, in one table.

use hyper::Method;

use super::reply::Reply;
use super::request::Call;
use super::{blobs, daemon, metrics, mount, settings};
use crate::control::{Control, ControlError};

/// Whether a request has a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BodyRule {
    /// It must not have one; an empty one counts as none.
    None,
    /// It must have one.
    Json,
}

/// One row.
pub(super) struct Route {
    pub(super) method: Method,
    pub(super) path: &'static str,
    pub(super) body: BodyRule,
    /// May take long, and so may only use its share of the pool.
    pub(super) slow: bool,
    pub(super) handler: fn(&dyn Control, &Call) -> Result<Reply, ControlError>,
}

type Handler = fn(&dyn Control, &Call) -> Result<Reply, ControlError>;

const fn quick(method: Method, path: &'static str, body: BodyRule, handler: Handler) -> Route {
    Route {
        method,
        path,
        body,
        slow: false,
        handler,
    }
}

const fn slow(method: Method, path: &'static str, body: BodyRule, handler: Handler) -> Route {
    Route {
        method,
        path,
        body,
        slow: true,
        handler,
    }
}

const fn get(path: &'static str, handler: Handler) -> Route {
    quick(Method::GET, path, BodyRule::None, handler)
}

/// The API of the incumbent. Paths are matched as they stand.
pub(super) static ROUTES: [Route; 24] = [
    get("/api/v1/daemon", daemon::info),
    quick(Method::PUT, "/api/v1/daemon", BodyRule::Json, daemon::configure),
    get("/api/v1/daemon/events", daemon::events),
    get("/api/v1/daemon/backend", daemon::superblock),
    slow(Method::PUT, "/api/v1/daemon/start", BodyRule::None, daemon::start),
    quick(Method::PUT, "/api/v1/daemon/exit", BodyRule::None, daemon::exit),
    quick(
        Method::PUT,
        "/api/v1/daemon/fuse/sendfd",
        BodyRule::None,
        daemon::send_fd,
    ),
    quick(
        Method::PUT,
        "/api/v1/daemon/fuse/takeover",
        BodyRule::None,
        daemon::take_over,
    ),
    slow(Method::POST, "/api/v1/mount", BodyRule::Json, mount::mount),
    slow(Method::PUT, "/api/v1/mount", BodyRule::Json, mount::remount),
    slow(Method::DELETE, "/api/v1/mount", BodyRule::None, mount::umount),
    get("/api/v1/config", settings::show),
    slow(Method::PUT, "/api/v1/config", BodyRule::Json, settings::change),
    get("/api/v1/metrics", metrics::fs),
    get("/api/v1/metrics/files", metrics::files),
    get("/api/v1/metrics/pattern", metrics::pattern),
    get("/api/v1/metrics/inflight", metrics::in_flight),
    get("/api/v1/metrics/backend", metrics::backend),
    get("/api/v1/metrics/blobcache", metrics::cache),
    get("/api/v2/daemon", daemon::info_v2),
    quick(Method::PUT, "/api/v2/daemon", BodyRule::Json, daemon::configure),
    get("/api/v2/blobs", blobs::list),
    quick(Method::PUT, "/api/v2/blobs", BodyRule::Json, blobs::create),
    quick(Method::DELETE, "/api/v2/blobs", BodyRule::None, blobs::delete),
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
        if route.method == method {
            return Found::Route(route);
        }
        allowed.push(route.method.as_str());
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
}
