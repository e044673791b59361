//! A lightweight load generator: prebuilt requests over persistent connections, each of which waits for an answer before it sends the next
//! request.
//!
//! It shares the CPU with what it measures, so it does as little as possible: no HTTP library, one task per connection, one buffer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::stats::{Times, rate};
use super::world::API_KEY;

/// What to send, and where.
#[derive(Clone)]
pub(super) struct Load {
    /// Connections are spread over these.
    pub(super) servers: Vec<SocketAddr>,
    pub(super) clients: u16,
    /// The time that is not measured: connections are opened, pools filled, plans cached.
    pub(super) warm_up: Duration,
    /// The time that is measured.
    pub(super) time: Duration,
    /// Makes the request with a number; no number is used twice.
    pub(super) request: Arc<dyn Fn(u64) -> Vec<u8> + Send + Sync>,
    /// The expected statuses.
    pub(super) statuses: &'static [u16],
}

/// The result of a load.
#[derive(Clone, Debug, Default)]
pub(super) struct Outcome {
    /// Answers per second.
    pub(super) rate: f64,
    /// The response times.
    pub(super) times: Times,
    /// Answers with an expected status since the first request, including those outside of the measured time.
    pub(super) answers: u64,
    /// Other answers. Only a paced run can have any: they end a run of the other kind.
    pub(super) refused: u64,
}

/// The usual warm-up time for this measured time.
pub(super) fn warm_up(time: Duration) -> Duration {
    time / 5
}

impl Load {
    /// POSTs of distinct messages that ask for an immediate receipt. No two loads share a message.
    pub(super) fn accept(servers: Vec<SocketAddr>, clients: u16, time: Duration) -> Self {
        let load: u32 = rand::random();
        let request = move |n| post(&format!("message {load:x} {n}"), "respond-async");
        Self { servers, clients, warm_up: warm_up(time), time, request: Arc::new(request), statuses: &[202] }
    }

    /// Sends requests as fast as the answers arrive.
    pub(super) async fn run(&self) -> Result<Outcome> {
        let begin = Instant::now() + self.warm_up;
        let (number, end) = (Arc::new(AtomicU64::new(0)), begin + self.time);
        let mut clients = JoinSet::new();
        for client in 0..usize::from(self.clients) {
            let (load, number) = (self.clone(), Arc::clone(&number));
            clients.spawn(async move {
                let mut connection = Connection::open(load.servers[client % load.servers.len()]).await?;
                let (mut times, mut answers) = (Vec::new(), 0);
                loop {
                    let sent = Instant::now();
                    if sent >= end {
                        return Ok((times, answers));
                    }
                    let request = (load.request)(number.fetch_add(1, Ordering::Relaxed));
                    connection.ask(&request, load.statuses).await?;
                    answers += 1;
                    let now = Instant::now();
                    if sent >= begin && now <= end {
                        times.push(now - sent);
                    }
                }
            });
        }
        gather(clients, self.time).await
    }

    /// Sends requests at an even rate. The response time counts from when a request is due, even if it is sent late because others are
    /// slow. Answers with other statuses are counted.
    pub(super) async fn run_paced(&self, per_second: f64, first: u64) -> Result<Outcome> {
        let begin = Instant::now();
        let number = Arc::new(AtomicU64::new(0));
        let mut clients = JoinSet::new();
        for client in 0..usize::from(self.clients) {
            let (load, number) = (self.clone(), Arc::clone(&number));
            clients.spawn(async move {
                let mut connection = Connection::open(load.servers[client % load.servers.len()]).await?;
                let (mut times, mut answers) = (Vec::new(), 0);
                loop {
                    let n = number.fetch_add(1, Ordering::Relaxed);
                    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
                    let after = Duration::from_secs_f64(n as f64 / per_second);
                    if after >= load.time {
                        return Ok((times, answers));
                    }
                    tokio::time::sleep_until(begin + after).await;
                    let (status, _) = connection.exchange(&(load.request)(first + n)).await?;
                    answers += u64::from(load.statuses.contains(&status));
                    times.push(begin.elapsed().saturating_sub(after));
                }
            });
        }
        gather(clients, self.time).await
    }
}

async fn gather(mut clients: JoinSet<Result<(Vec<Duration>, u64)>>, time: Duration) -> Result<Outcome> {
    let (mut all, mut sum) = (Vec::new(), 0);
    while let Some(ended) = clients.join_next().await {
        let (times, answers) = ended.context("a client of the load generator")??;
        all.extend(times);
        sum += answers;
    }
    if all.is_empty() {
        return Err(anyhow!("nothing was answered in the time that was measured"));
    }
    let refused = (all.len() as u64).saturating_sub(sum);
    Ok(Outcome { rate: rate(all.len() as u64, time), times: Times::of(all), answers: sum, refused })
}

/// A request `POST /crypto/sign`.
pub(super) fn post(message: &str, prefer: &str) -> Vec<u8> {
    let body = format!("{{\"message\":\"{message}\"}}");
    let prefer = if prefer.is_empty() { String::new() } else { format!("Prefer: {prefer}\r\n") };
    format!(
        "POST /crypto/sign HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {API_KEY}\r\nContent-Type: application/json\r\n{prefer}\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// A `GET` request for a path.
pub(super) fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {API_KEY}\r\nAuthorization: upstream-key\r\n\r\n").into_bytes()
}

/// A persistent connection.
pub(super) struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    /// Opens a connection.
    pub(super) async fn open(server: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(server).await.with_context(|| format!("connecting to {server}"))?;
        stream.set_nodelay(true).with_context(|| format!("connecting to {server}"))?;
        Ok(Self { stream, buffer: Vec::with_capacity(4096) })
    }

    /// Sends a request.
    pub(super) async fn send(&mut self, request: &[u8]) -> Result<()> {
        self.stream.write_all(request).await.context("sending a request")
    }

    /// Sends a request and reads the answer, whose status must be one of these.
    pub(super) async fn ask(&mut self, request: &[u8], statuses: &[u16]) -> Result<&[u8]> {
        let (status, body) = self.exchange(request).await?;
        if statuses.contains(&status) {
            return Ok(body);
        }
        let text: String = String::from_utf8_lossy(body).chars().take(200).collect();
        Err(anyhow!("answered {status} instead of {statuses:?}: {text}"))
    }

    /// Sends a request and reads the answer: its status and its body.
    pub(super) async fn exchange(&mut self, request: &[u8]) -> Result<(u16, &[u8])> {
        self.send(request).await?;
        self.buffer.clear();
        let (head, length, answered) = loop {
            if self.stream.read_buf(&mut self.buffer).await.context("reading an answer")? == 0 {
                return Err(anyhow!("the server closed the connection"));
            }
            if let Some(head) = find(&self.buffer, b"\r\n\r\n") {
                let text = std::str::from_utf8(&self.buffer[..head]).context("reading an answer")?;
                let parsed = parse(text).ok_or_else(|| anyhow!("an answer without a length: {text}"))?;
                break (head + 4, parsed.1, parsed.0);
            }
        };
        while self.buffer.len() < head + length {
            if self.stream.read_buf(&mut self.buffer).await.context("reading an answer")? == 0 {
                return Err(anyhow!("the server closed the connection"));
            }
        }
        Ok((answered, &self.buffer[head..]))
    }
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

/// Parses the status and the length of the body.
fn parse(head: &str) -> Option<(u16, usize)> {
    let mut lines = head.split("\r\n");
    let status: u16 = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let length = lines.find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    });
    if status == 204 { Some((status, 0)) } else { length.map(|length| (status, length)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answers_head_is_read() {
        assert_eq!(parse("HTTP/1.1 202 Accepted\r\ndate: x\r\nContent-Length: 12"), Some((202, 12)));
        assert_eq!(parse("HTTP/1.1 204 No Content"), Some((204, 0)));
        assert_eq!(parse("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked"), None);
        assert_eq!(find(b"ab\r\n\r\nc", b"\r\n\r\n"), Some(2));
    }
}
