//! Accepts connections, and keeps little memory for those whose caller waits.
//!
//! hyper speaks HTTP, and a poem endpoint answers the requests; this module connects the two. poem's own server holds about 35 KB for each
//! waiting caller, and there may be tens of thousands of them.
//!
//! | file | what |
//! |---|---|
//! | `connection` | one connection, from request to request |
//! | `rest` | the rest of a slow answer |
//! | `socket` | the stream that a connection reads from and writes to |

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

/// How long requests in flight may take once the service is told to stop. Long polls are cut short before that.
const GRACE: Duration = Duration::from_secs(5);

/// The pause after a failed accept. The cause is a lack of something (files, memory) that other connections may free.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(50);

/// Serves connections from `listener`, whose address is `local`, until `stop` is cancelled; then finishes the requests in flight.
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

/// Whether a connection failed before it was accepted. This says nothing about the next one.
fn is_the_callers(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused)
}
