//! Malicious webhook receivers. They use raw sockets, because no HTTP library would do what they do.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// What a hostile receiver does with each connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hostility {
    /// Reads the request, then sends headers without end, as fast as the client takes them.
    EndlessHeaders,
    /// Reads the request, then sends headers without end, one per second.
    SlowHeaders,
    /// Answers 200 with an endless body, one byte per second.
    EndlessBody,
    /// Answers 200 with a body of 10 GB, as fast as the client takes it.
    HugeBody,
    /// Redirects with 307 to its own next number, a thousand times.
    Redirects,
    /// Accepts the connection and sends nothing, which stalls a TLS handshake.
    Stall,
    /// Accepts the connection and closes it.
    HangUp,
    /// Reads the request and answers 429 with this `Retry-After`.
    RetryAfter(String),
}

/// A running hostile receiver. Dropping it stops it.
#[derive(Debug)]
pub struct Hostile {
    addr: SocketAddr,
    seen: Arc<Seen>,
    task: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Seen {
    connections: AtomicU64,
    sent: AtomicU64,
}

impl Hostile {
    /// Starts on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn start(hostility: Hostility) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("listening on 127.0.0.1")?;
        let addr = listener.local_addr().context("listening on 127.0.0.1")?;
        let seen = Arc::new(Seen::default());
        let shared = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => {
                        let Ok((stream, _)) = accepted else { continue };
                        shared.connections.fetch_add(1, Ordering::Relaxed);
                        let (hostility, seen) = (hostility.clone(), Arc::clone(&shared));
                        // The error means that the client gave up.
                        connections.spawn(async move { drop(serve(stream, &hostility, &seen).await) });
                    }
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        Ok(Self { addr, seen, task })
    }

    /// Its URL with the scheme, http or https.
    #[must_use]
    pub fn url(&self, scheme: &str) -> String {
        format!("{scheme}://{}/0", self.addr)
    }

    /// The number of connections that it has accepted.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.seen.connections.load(Ordering::Relaxed)
    }

    /// The number of bytes that it has sent.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.seen.sent.load(Ordering::Relaxed)
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(mut stream: TcpStream, hostility: &Hostility, seen: &Seen) -> io::Result<()> {
    match hostility {
        Hostility::HangUp => return Ok(()),
        Hostility::Stall => return stalled(&mut stream).await,
        _ => {}
    }
    let path = read_request(&mut stream).await?;
    match hostility {
        Hostility::EndlessHeaders | Hostility::SlowHeaders => {
            send(&mut stream, seen, b"HTTP/1.1 200 OK\r\n").await?;
            for number in 0_u64.. {
                send(&mut stream, seen, format!("x-{number}: {}\r\n", "x".repeat(100)).as_bytes()).await?;
                if *hostility == Hostility::SlowHeaders {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
        Hostility::EndlessBody => {
            send(&mut stream, seen, b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await?;
            loop {
                send(&mut stream, seen, b"1\r\n.\r\n").await?;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        Hostility::HugeBody => {
            send(&mut stream, seen, b"HTTP/1.1 200 OK\r\ncontent-length: 10000000000\r\n\r\n").await?;
            let chunk = vec![b'x'; 64 * 1024];
            while seen.sent.load(Ordering::Relaxed) < 10_000_000_000 {
                send(&mut stream, seen, &chunk).await?;
            }
        }
        Hostility::Redirects => {
            let next = path.trim_start_matches('/').parse::<u32>().unwrap_or(0) + 1;
            let answer = if next > 1000 { "HTTP/1.1 200 OK\r\n".to_owned() } else { format!("HTTP/1.1 307 Next\r\nlocation: /{next}\r\n") };
            send(&mut stream, seen, format!("{answer}content-length: 0\r\nconnection: close\r\n\r\n").as_bytes()).await?;
        }
        Hostility::RetryAfter(value) => {
            let answer = format!("HTTP/1.1 429 Later\r\nretry-after: {value}\r\ncontent-length: 5\r\nconnection: close\r\n\r\nlater");
            send(&mut stream, seen, answer.as_bytes()).await?;
        }
        Hostility::Stall | Hostility::HangUp => {}
    }
    Ok(())
}

/// Keeps the connection open without reading or sending, until the client disconnects.
async fn stalled(stream: &mut TcpStream) -> io::Result<()> {
    let mut first = [0; 1];
    while stream.peek(&mut first).await? > 0 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

async fn send(stream: &mut TcpStream, seen: &Seen, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes).await?;
    seen.sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    Ok(())
}

/// Reads a request and returns its path.
async fn read_request(stream: &mut TcpStream) -> io::Result<String> {
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let head = request.windows(4).position(|window| window == b"\r\n\r\n");
        if let Some(end) = head {
            let text = String::from_utf8_lossy(&request[..end]).to_ascii_lowercase();
            let length = text.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
            if request.len() >= end + 4 + length.unwrap_or(0) {
                return Ok(text.split_whitespace().nth(1).unwrap_or_default().to_owned());
            }
        }
        match stream.read(&mut buffer).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => request.extend_from_slice(&buffer[..count]),
        }
    }
}
