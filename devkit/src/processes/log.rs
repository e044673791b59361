//! The output of a process, bounded in size and searchable while the process runs.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::sync::watch;

/// The largest size of a log, in bytes; the oldest lines are dropped first.
const KEPT: usize = 4 << 20;

/// The lines of one process, from both of its outputs.
#[derive(Clone, Debug)]
pub(super) struct Log {
    lines: Arc<Mutex<Lines>>,
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Lines {
    kept: VecDeque<String>,
    bytes: usize,
}

impl Lines {
    fn push(&mut self, line: String, bound: usize) {
        self.bytes += line.len();
        self.kept.push_back(line);
        while self.bytes > bound {
            let Some(oldest) = self.kept.pop_front() else { return };
            self.bytes -= oldest.len();
        }
    }
}

impl Log {
    pub(super) fn new() -> Self {
        Self { lines: Arc::default(), changed: watch::Sender::new(()) }
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads lines until the output ends.
    pub(super) async fn follow(self, output: impl AsyncRead + Unpin) {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        // A read error is treated like the end of the output: the process is gone.
        while output.read_until(b'\n', &mut line).await.is_ok_and(|read| read > 0) {
            let text = String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned();
            self.lines().push(text, KEPT);
            self.changed.send_replace(());
            line.clear();
        }
    }

    /// All lines that are kept.
    pub(super) fn text(&self) -> String {
        self.lines().kept.iter().fold(String::new(), |text, line| text + line + "\n")
    }

    /// Waits for a line that contains the text, and returns it. Lines printed earlier count.
    pub(super) async fn line_with(&self, text: &str) -> String {
        // Subscribe before the first search, so that a line in between is not missed.
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(line) = self.lines().kept.iter().find(|line| line.contains(text)) {
                return line.clone();
            }
            changed.changed().await.expect("this log holds the sender");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_found_whether_they_came_before_or_come_later() {
        let log = Log::new();
        let (mut write, read) = tokio::io::duplex(64);
        let follow = tokio::spawn(log.clone().follow(read));
        let waiting = tokio::spawn({
            let log = log.clone();
            async move { log.line_with("second").await }
        });
        tokio::io::AsyncWriteExt::write_all(&mut write, b"first line\nthe second\nno newline").await.unwrap();
        assert_eq!(waiting.await.unwrap(), "the second");
        assert_eq!(log.line_with("first").await, "first line");
        drop(write);
        follow.await.unwrap();
        assert_eq!(log.text(), "first line\nthe second\nno newline\n");
    }

    #[test]
    fn the_oldest_lines_go_when_there_are_too_many() {
        let mut lines = Lines::default();
        for n in 0..10 {
            lines.push(format!("line {n}"), 20);
        }
        assert_eq!(lines.kept, ["line 7", "line 8", "line 9"].map(str::to_owned));
    }
}
