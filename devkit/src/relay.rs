//! A TCP relay that can go silent, for tests.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Relays connections to a port until it is told to go silent.
///
/// Then open connections stay open but carry no more data, as if the host had vanished. New connections are relayed.
#[derive(Debug)]
pub struct Relay {
    /// The port that it listens on.
    pub port: u16,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    silenced: watch::Sender<u64>,
    silenced_by: Mutex<Option<Vec<u8>>>,
}

impl Relay {
    /// Starts a relay to `port`.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn to(port: u16) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("listening")?;
        let own = listener.local_addr().context("listening")?.port();
        let state = Arc::new(State { silenced: watch::Sender::new(0), silenced_by: Mutex::default() });
        let passing = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(pass_on(client, port, Arc::clone(&passing)));
            }
        });
        Ok(Self { port: own, state })
    }

    /// Silences all open connections.
    pub fn fall_silent(&self) {
        self.state.fall_silent();
    }

    /// Silences all open connections as soon as a client sends these bytes, which are not passed on.
    pub fn fall_silent_at(&self, bytes: &[u8]) {
        *self.state.silenced_by.lock().unwrap_or_else(PoisonError::into_inner) = Some(bytes.to_owned());
    }
}

impl State {
    fn fall_silent(&self) {
        self.silenced.send_modify(|times| *times += 1);
    }

    /// Returns whether the bytes contain those of [`Relay::fall_silent_at`], and forgets those if so.
    fn is_silenced_by(&self, sent: &[u8]) -> bool {
        let mut by = self.silenced_by.lock().unwrap_or_else(PoisonError::into_inner);
        by.take_if(|bytes| sent.windows(bytes.len()).any(|window| window == bytes)).is_some()
    }
}

async fn pass_on(mut client: TcpStream, port: u16, state: Arc<State>) {
    let mut silenced = state.silenced.subscribe();
    let Ok(mut server) = TcpStream::connect(("127.0.0.1", port)).await else { return };
    let (mut sent, mut answered) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    loop {
        let passed = tokio::select! {
            biased;
            _ = silenced.changed() => std::future::pending().await,
            read = client.read(&mut sent) => match read {
                Ok(read @ 1..) if state.is_silenced_by(&sent[..read]) => {
                    state.fall_silent();
                    continue;
                }
                Ok(read @ 1..) => server.write_all(&sent[..read]).await,
                _ => return,
            },
            read = server.read(&mut answered) => match read {
                Ok(read @ 1..) => client.write_all(&answered[..read]).await,
                _ => return,
            },
        };
        if passed.is_err() {
            return;
        }
    }
}
