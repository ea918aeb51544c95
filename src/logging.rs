//! The log: one line per event, on stderr or in a file, as text (`[time] LEVEL [file:line] message`) or as JSON.
//!
//! Runtimes read the daemon's stderr through a pipe, and take a line that is too long for the death of the daemon.
//! So lines are cut, what could start a new line is escaped, and nothing here ever waits for the reader: lines go to a
//! thread that writes them, and when that thread is stuck in a full pipe, further lines are dropped and counted.
//! A pipe that is closed costs the lines and nothing else.
//!
//! Rooms: `line` (from an event to its line), `bridge` (events of the `log` crate), `file` (log files).

mod bridge;
mod file;
mod line;

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use kata::control::Events;
use kata::timestamp::Utc;
use parking_lot::Mutex;
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::{Registry, reload};

use crate::cli::{LogFormat, LogLevel};
use crate::error::Error;
use crate::sandbox::{Role, Sandbox};
pub use file::LogFile;
use line::Record;

/// Lines that wait for the writing thread, beside those in the pipe. Their places take memory from the start.
const QUEUE: usize = 512;

/// How long the last lines may take to leave at the end.
const LAST_LINES: Duration = Duration::from_millis(200);

/// Errors that are kept for the API, and their bytes.
const KEPT_ERRORS: usize = 500;
const KEPT_BYTES: usize = 51_200;

/// Where lines go.
enum Sink {
    Stderr,
    File(LogFile),
}

enum Message {
    Line(String),
    Flush(SyncSender<()>),
}

/// The log of the process. The level can be changed while it runs.
#[derive(Clone)]
pub struct Log {
    lines: SyncSender<Message>,
    level: reload::Handle<LevelFilter, Registry>,
    errors: Arc<Mutex<VecDeque<String>>>,
}

impl Log {
    /// Starts the log of the process: on stderr, or in `file`. Its thread puts on `sandbox`.
    ///
    /// # Errors
    ///
    /// The process has a log already, or its thread could not be made.
    pub fn start(
        level: LogLevel,
        format: LogFormat,
        file: Option<LogFile>,
        sandbox: Sandbox,
    ) -> Result<Self, Error> {
        let failed = |error: &dyn std::fmt::Display| Error::Start(format!("cannot start the log: {error}"));
        let (sender, receiver) = sync_channel(QUEUE);
        let lost = Arc::new(AtomicU64::new(0));
        let errors = Arc::new(Mutex::new(VecDeque::new()));
        let sink = file.map_or(Sink::Stderr, Sink::File);
        let lost_lines = lost.clone();
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || {
                sandbox.enter(Role::Log);
                write_lines(&receiver, sink, format, &lost_lines);
            })
            .map_err(|error| failed(&error))?;
        let (filter, handle) = reload::Layer::new(level.filter());
        let lines = Lines {
            sender: sender.clone(),
            format,
            lost,
            errors: errors.clone(),
        };
        bridge::install(lines.clone(), level.filter()).map_err(|error| failed(&error))?;
        let subscriber = tracing_subscriber::registry().with(filter).with(lines);
        tracing::subscriber::set_global_default(subscriber).map_err(|error| failed(&error))?;
        Ok(Self {
            lines: sender,
            level: handle,
            errors,
        })
    }

    /// Changes the level: `trace debug info warn error off`.
    pub fn set_level(&self, level: &str) -> Result<(), String> {
        let filter: LevelFilter = level
            .parse()
            .map_err(|_| format!("unknown log level {level:?}"))?;
        bridge::set_level(filter);
        self.level.reload(filter).map_err(|error| error.to_string())
    }

    /// The level in force.
    pub fn level(&self) -> String {
        let level = self.level.with_current(ToString::to_string);
        level.unwrap_or_default()
    }

    /// Errors that were logged lately.
    pub fn errors(&self) -> Events {
        let errors: Vec<String> = self.errors.lock().iter().cloned().collect();
        Events {
            max_errors: KEPT_ERRORS,
            total_errors: errors.len(),
            max_size: KEPT_BYTES,
            total_size: errors.iter().map(String::len).sum(),
            errors,
        }
    }

    /// Waits a moment for what was logged so far to be written.
    pub fn flush(&self) {
        let (done, written) = sync_channel(1);
        if self.lines.try_send(Message::Flush(done)).is_ok() {
            let _ = written.recv_timeout(LAST_LINES);
        }
    }
}

impl LogLevel {
    fn filter(self) -> LevelFilter {
        match self {
            Self::Trace => LevelFilter::TRACE,
            Self::Debug => LevelFilter::DEBUG,
            Self::Info => LevelFilter::INFO,
            Self::Warn => LevelFilter::WARN,
            Self::Error => LevelFilter::ERROR,
        }
    }
}

fn write_lines(messages: &Receiver<Message>, mut sink: Sink, format: LogFormat, lost: &AtomicU64) {
    while let Ok(message) = messages.recv() {
        match message {
            Message::Line(line) => {
                sink.write(&line);
                let lost = lost.swap(0, Ordering::Relaxed);
                if lost > 0 {
                    let message = format!("{lost} lines were lost: the reader was too slow");
                    sink.write(&Record::new(Level::WARN, message).line(format, Utc::now()));
                }
            }
            Message::Flush(done) => {
                let _ = done.send(());
            }
        }
    }
}

impl Sink {
    /// There is nobody to tell that a line could not be written.
    fn write(&mut self, line: &str) {
        match self {
            Self::Stderr => {
                let _ = io::stderr().lock().write_all(line.as_bytes());
            }
            Self::File(file) => file.write(line),
        }
    }
}

/// Makes lines of events.
#[derive(Clone)]
struct Lines {
    sender: SyncSender<Message>,
    format: LogFormat,
    lost: Arc<AtomicU64>,
    errors: Arc<Mutex<VecDeque<String>>>,
}

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        self.write(&Record::of(event));
    }
}

impl Lines {
    fn write(&self, record: &Record) {
        if record.level() == Level::ERROR {
            self.keep(&record.text());
        }
        let line = record.line(self.format, Utc::now());
        if self.sender.try_send(Message::Line(line)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn keep(&self, message: &str) {
        let mut errors = self.errors.lock();
        errors.push_back(message.to_owned());
        let mut bytes: usize = errors.iter().map(String::len).sum();
        while errors.len() > KEPT_ERRORS || bytes > KEPT_BYTES {
            match errors.pop_front() {
                Some(oldest) => bytes -= oldest.len(),
                None => break,
            }
        }
    }
}
