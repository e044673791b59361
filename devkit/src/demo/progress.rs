//! The progress of the burst: a bar on a terminal, otherwise an occasional line.

use std::io::IsTerminal;
use std::sync::Mutex;

use indicatif::{ProgressBar, ProgressStyle};

/// Shows two counts of the same total.
pub(super) struct Progress {
    total: usize,
    bar: Option<ProgressBar>,
    /// The last tenth that a line was printed for.
    printed: Mutex<usize>,
}

impl Progress {
    pub(super) fn start(total: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{elapsed_precise} [{bar:40}] {pos}/{len} signed, {msg}");
            let bar = ProgressBar::new(total as u64).with_style(style.expect("the template is valid").progress_chars("=> "));
            bar.enable_steady_tick(std::time::Duration::from_millis(250));
            bar
        });
        Self { total, bar, printed: Mutex::new(0) }
    }

    pub(super) fn show(&self, signed: usize, delivered: usize) {
        if let Some(bar) = &self.bar {
            bar.set_position(signed as u64);
            bar.set_message(format!("{delivered} delivered"));
            return;
        }
        let tenth = (signed + delivered) * 5 / self.total.max(1);
        let mut printed = self.printed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if tenth > *printed {
            *printed = tenth;
            say!("{signed}/{} signed, {delivered} delivered", self.total);
        }
    }

    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
