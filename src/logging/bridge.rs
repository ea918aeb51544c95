//! Events of libraries that speak to the `log` crate.

use log::{LevelFilter, Log, Metadata, SetLoggerError};
use tracing::Level;
use tracing::level_filters::LevelFilter as OurFilter;

use super::Lines;
use super::line::Record;

struct Bridge(Lines);

/// Sends what libraries log to `lines`, as far as `level` lets it.
///
/// # Errors
///
/// The process has a logger already.
pub(super) fn install(lines: Lines, level: OurFilter) -> Result<(), SetLoggerError> {
    log::set_boxed_logger(Box::new(Bridge(lines)))?;
    set_level(level);
    Ok(())
}

/// Changes the level.
pub(super) fn set_level(level: OurFilter) {
    log::set_max_level(match level.into_level() {
        None => LevelFilter::Off,
        Some(Level::ERROR) => LevelFilter::Error,
        Some(Level::WARN) => LevelFilter::Warn,
        Some(Level::INFO) => LevelFilter::Info,
        Some(Level::DEBUG) => LevelFilter::Debug,
        Some(Level::TRACE) => LevelFilter::Trace,
    });
}

impl Log for Bridge {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let level = match record.level() {
            log::Level::Error => Level::ERROR,
            log::Level::Warn => Level::WARN,
            log::Level::Info => Level::INFO,
            log::Level::Debug => Level::DEBUG,
            log::Level::Trace => Level::TRACE,
        };
        let message = format!("{}: {}", record.target(), record.args());
        // Where a library says something is of no use to people; which library it is stands in the text.
        self.0.write(&Record::new(level, message));
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::LogFormat;
    use crate::logging::Message;

    #[test]
    fn what_a_library_says_becomes_a_line() {
        let (sender, receiver) = std::sync::mpsc::sync_channel(8);
        let lines = Lines {
            sender,
            format: LogFormat::Text,
            lost: Default::default(),
            errors: Default::default(),
        };
        let bridge = Bridge(lines.clone());
        set_level(OurFilter::WARN);
        for (level, text) in [
            (log::Level::Info, "quiet"),
            (log::Level::Warn, "two\nlines"),
            (log::Level::Error, "kept"),
        ] {
            bridge.log(
                &log::Record::builder()
                    .level(level)
                    .target("vhost")
                    .args(format_args!("{text}"))
                    .build(),
            );
        }
        let next = || match receiver.try_recv() {
            Ok(Message::Line(line)) => line,
            _ => String::new(),
        };
        assert!(next().ends_with("] WARN vhost: two\\nlines\n"));
        assert!(next().ends_with("] ERROR vhost: kept\n"));
        assert_eq!(next(), "", "INFO is below the level");
        assert_eq!(lines.errors.lock().len(), 1, "errors are kept for the API");
    }
}
