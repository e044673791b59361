//! The listener for operators: health and metrics.

use std::io;
use std::time::Duration;

use poem::http::uri::Scheme;
use poem::listener::Acceptor;
use poem::web::{LocalAddr, RemoteAddr};

/// How long to wait after a connection could not be accepted.
const AFTER_AN_ERROR: Duration = Duration::from_millis(50);

/// Accepts connections, and waits a moment after an error: poem's server asks again at once; while no files are left, it would do nothing
/// else.
pub struct Unhurried<A>(pub A);

impl<A: Acceptor> Acceptor for Unhurried<A> {
    type Io = A::Io;

    fn local_addr(&self) -> Vec<LocalAddr> {
        self.0.local_addr()
    }

    async fn accept(&mut self) -> io::Result<(Self::Io, LocalAddr, RemoteAddr, Scheme)> {
        let accepted = self.0.accept().await;
        if accepted.is_err() {
            tokio::time::sleep(AFTER_AN_ERROR).await;
        }
        accepted
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// As a listener of a process without files.
    struct NoFiles(Arc<AtomicU32>);

    impl Acceptor for NoFiles {
        type Io = tokio::io::DuplexStream;

        fn local_addr(&self) -> Vec<LocalAddr> {
            Vec::new()
        }

        async fn accept(&mut self) -> io::Result<(Self::Io, LocalAddr, RemoteAddr, Scheme)> {
            self.0.fetch_add(1, Ordering::Relaxed);
            tokio::task::yield_now().await;
            Err(io::Error::other("too many open files"))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn while_no_files_are_left_it_is_tried_now_and_then() {
        let tried = Arc::new(AtomicU32::new(0));
        let server = poem::Server::new_with_acceptor(Unhurried(NoFiles(Arc::clone(&tried))));
        let _ = tokio::time::timeout(Duration::from_secs(1), server.run(poem::Route::new())).await;
        assert!((15..=21).contains(&tried.load(Ordering::Relaxed)), "{tried:?}");
    }
}
