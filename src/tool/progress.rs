//! A progress bar on standard error, if that is a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// One bar for one long piece of work. Removed from the screen when dropped.
pub(super) struct Bar(ProgressBar);

impl Bar {
    /// Counts without knowing an end. `what` is shown in front.
    pub(super) fn counting(what: &'static str) -> Self {
        Self::new("{prefix} {spinner} {msg}", what)
    }

    /// Counts bytes; the end is told by [`Bar::expect`].
    pub(super) fn bytes(what: &'static str) -> Self {
        Self::new(
            "{prefix} {wide_bar:.cyan/dim} {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta}",
            what,
        )
    }

    /// Counts things of which there are so many.
    pub(super) fn items(what: &'static str, total: u64) -> Self {
        let bar = Self::new("{prefix} {wide_bar:.cyan/dim} {pos}/{len}  {eta}", what);
        bar.expect(total);
        bar
    }

    fn new(template: &str, what: &'static str) -> Self {
        // Hidden by itself when standard error is no terminal.
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(what);
        if !bar.is_hidden() {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        Self(bar)
    }

    pub(super) fn expect(&self, total: u64) {
        self.0.set_length(total);
    }

    pub(super) fn add(&self, amount: u64) {
        self.0.inc(amount);
    }

    pub(super) fn show(&self, text: impl FnOnce() -> String) {
        if !self.0.is_hidden() {
            self.0.set_message(text());
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
