//! Accepts connections, and keeps next to nothing of those whose caller waits.
//!
//! HTTP is hyper's, and what is asked of a connection is answered by a poem endpoint; this is what lies between the two. poem's own server
//! holds some 35 KB for a caller who waits, and there may be tens of thousands of them.
//!
//! | file | what |
//! |---|---|
//! | `connection` | one connection, from request to request |
//! | `rest` | the rest of an answer that takes long |
//! | `socket` | what a connection reads from and writes to |

mod connection;
mod rest;
mod socket;
#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use poem::Endpoint;
use poem::web::{LocalAddr, RemoteAddr};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use connection::Connection;
pub(crate) use rest::Rest;

/// Requests in flight may take this long once the service is told to stop; a long poll is cut short by then.
const GRACE: Duration = Duration::from_secs(5);

/// The pause after a connection that could not be accepted, which is for want of something (files, memory) that others may give back.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(50);

/// Serves what comes to `listener`, whose address is `local`, until `stop` is cancelled; then finishes the requests in flight.
pub async fn serve<E: Endpoint + 'static>((listener, local): (TcpListener, SocketAddr), endpoint: E, stop: CancellationToken) {
    let (endpoint, tasks, cut) = (Arc::new(endpoint), TaskTracker::new(), CancellationToken::new());
    let local = LocalAddr(local.into());
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        match accepted {
            Ok((stream, caller)) => {
                let between = (local.clone(), RemoteAddr(caller.into()));
                let connection = Connection::new(Arc::clone(&endpoint), between, stop.clone());
                tasks.spawn(cut.clone().run_until_cancelled_owned(connection.serve(stream)));
            }
            Err(error) if is_the_callers(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "can't accept a connection");
                tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
            }
        }
    }
    drop(listener);
    tasks.close();
    if tokio::time::timeout(GRACE, tasks.wait()).await.is_err() {
        cut.cancel();
        tasks.wait().await;
    }
}

/// Whether a connection failed before it was accepted, which says nothing of the next one.
fn is_the_callers(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused)
}
