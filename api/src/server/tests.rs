//! Connections over real sockets: delayed answers compared with immediate ones, and callers that behave badly.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use poem::endpoint::make;
use poem::{Endpoint, EndpointExt, Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::connection::IDLE;
use super::socket::TAKEN_WITHIN;
use super::{GRACE, Rest, serve};

/// More than the system buffers for a caller that reads nothing.
const LARGE: usize = 32 * 1024 * 1024;

/// A server with the paths `/now`, `/later`, `/large`, and `/now-read` and `/later-read`, which read their body first.
struct Served {
    addr: SocketAddr,
    /// A permit for each delayed answer that may be sent.
    answers: Arc<Semaphore>,
    asked: Arc<Mutex<Vec<String>>>,
    /// The number of waiting callers.
    waiting: watch::Receiver<usize>,
    stop: CancellationToken,
    server: JoinHandle<()>,
}

impl Served {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (answers, asked, stop) = (Arc::new(Semaphore::new(0)), Arc::new(Mutex::new(Vec::new())), CancellationToken::new());
        let (waits, waiting) = watch::channel(0);
        let endpoint = endpoint(Arc::clone(&answers), Arc::clone(&asked), Arc::new(waits), stop.clone());
        let server = tokio::spawn(serve((listener, addr), endpoint, stop.clone()));
        Self { addr, answers, asked, waiting, stop, server }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.addr).await.unwrap()
    }

    async fn until_waiting(&mut self, callers: usize) {
        within(self.waiting.wait_for(|waiting| *waiting == callers)).await.unwrap();
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }

    /// Sends `request`, which must end the connection, and returns all that the server sends. Permits `answers` delayed answers.
    async fn said_to(&mut self, request: &str, answers: usize) -> String {
        let mut connection = self.connect().await;
        connection.write_all(request.as_bytes()).await.unwrap();
        if answers > 0 {
            self.until_waiting(1).await;
        }
        self.answers.add_permits(answers);
        let mut said = String::new();
        within(connection.read_to_string(&mut said)).await.unwrap();
        said.lines().filter(|line| !line.starts_with("date:")).collect::<Vec<_>>().join("\n")
    }
}

/// Counts as one waiting caller until it is dropped.
struct Waits(Arc<watch::Sender<usize>>);

impl Waits {
    fn new(waiting: &Arc<watch::Sender<usize>>) -> Self {
        waiting.send_modify(|waiting| *waiting += 1);
        Self(Arc::clone(waiting))
    }
}

impl Drop for Waits {
    fn drop(&mut self) {
        self.0.send_modify(|waiting| *waiting -= 1);
    }
}

fn endpoint(
    answers: Arc<Semaphore>,
    asked: Arc<Mutex<Vec<String>>>,
    waiting: Arc<watch::Sender<usize>>,
    stop: CancellationToken,
) -> impl Endpoint + 'static {
    let answer = move |mut request: Request| {
        let (answers, waiting, stop) = (Arc::clone(&answers), Arc::clone(&waiting), stop.clone());
        let path = request.uri().path().to_owned();
        asked.lock().unwrap().push(path.clone());
        async move {
            if path.ends_with("-read") {
                request.take_body().into_bytes().await.unwrap();
            }
            let done = || Response::builder().content_type("text/plain").body("done");
            match path.as_str() {
                "/large" => Response::builder().body(vec![b'.'; LARGE]),
                "/now" | "/now-read" => done(),
                _ => Rest::response(async move {
                    let _waits = Waits::new(&waiting);
                    tokio::select! {
                        permit = answers.acquire() => permit.unwrap().forget(),
                        () = stop.cancelled() => {}
                    }
                    done()
                }),
            }
        }
    };
    make(move |request| {
        let answered = answer(request);
        async move { Ok::<_, poem::Error>(answered.await) }
    })
    .boxed()
}

/// Runs `work` with a timeout that is longer than anything here takes.
async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_mins(1), work).await.unwrap()
}

/// Reads until `end` has been read `times` times.
async fn read_until(connection: &mut TcpStream, end: &str, times: usize) -> String {
    let mut read = Vec::new();
    while String::from_utf8_lossy(&read).matches(end).count() < times {
        assert_ne!(within(connection.read_buf(&mut read)).await.unwrap(), 0, "ended after {}", String::from_utf8_lossy(&read));
    }
    String::from_utf8(read).unwrap()
}

#[tokio::test]
async fn what_was_waited_for_is_written_as_if_it_had_not_been() {
    let mut served = Served::start().await;
    for method in ["GET", "HEAD", "POST"] {
        for (version, connection) in [
            ("1.1", "close"),
            ("1.0", "close"),
            ("1.0", "keep-alive"),
            ("1.1", "keep-alive"),
            ("1.1", "TE, close"),
            ("1.0", "keep-alive, close"),
        ] {
            let request = |path: &str| {
                // If the connection is kept alive, a second request ends it.
                let first = format!("{method} {path} HTTP/{version}\r\nhost: a\r\nconnection: {connection}\r\n\r\n");
                let kept = connection == "keep-alive";
                if kept { format!("{first}GET /now HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n") } else { first }
            };
            let expected = served.said_to(&request("/now"), 0).await;
            assert!(expected.starts_with(&format!("HTTP/{version} 200 OK")), "{expected}");
            assert_eq!(served.said_to(&request("/later"), 1).await, expected, "{method} {version} {connection}");
        }
    }
}

#[tokio::test]
async fn what_comes_behind_a_body_of_two_lengths_is_no_request() {
    let mut served = Served::start().await;
    let request = |path: &str| {
        let head = format!("POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: 6\r\ntransfer-encoding: chunked\r\n\r\n");
        format!("{head}1\r\n1\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n")
    };
    let expected = served.said_to(&request("/now-read"), 0).await;
    assert_eq!(served.said_to(&request("/later-read"), 1).await, expected);
    assert_eq!(served.asked(), ["/now-read", "/later-read"]);
}

#[tokio::test]
async fn what_is_sent_while_the_caller_waits_is_answered_afterwards() {
    let mut served = Served::start().await;
    let mut connection = served.connect().await;
    let posts = "POST /later-read HTTP/1.1\r\ncontent-length: 5\r\n\r\n12345GET /now HTTP/1.1\r\n\r\n";
    for _ in 0..2 {
        connection.write_all(posts.as_bytes()).await.unwrap();
        served.until_waiting(1).await;
        connection.write_all(b"GET /now HTTP/1.1\r\n\r\n").await.unwrap();
        served.answers.add_permits(1);
        let said = read_until(&mut connection, "done", 3).await;
        assert_eq!(said.matches("HTTP/1.1 200 OK").count(), 3, "{said}");
    }
    assert_eq!(served.asked(), ["/later-read", "/now", "/now", "/later-read", "/now", "/now"]);
}

#[tokio::test]
async fn an_earlier_answer_that_is_not_taken_yet_is_not_lost_when_the_next_one_waits() {
    let mut served = Served::start().await;
    let mut connection = served.connect().await;
    connection.write_all(b"GET /large HTTP/1.1\r\n\r\nGET /later HTTP/1.1\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut first = [0; 1024];
    connection.read_exact(&mut first).await.unwrap();
    let mut rest = Vec::new();
    let answered = async {
        served.until_waiting(1).await;
        served.answers.add_permits(1);
    };
    let (read, ()) = within(async { tokio::join!(connection.read_to_end(&mut rest), answered) }).await;
    read.unwrap();
    let dots = first.iter().chain(&rest).filter(|byte| **byte == b'.').count();
    // Each of the two "HTTP/1.1" has one more.
    assert_eq!(dots, LARGE + 2);
    assert!(rest.ends_with(b"done"));
}

#[tokio::test]
async fn a_body_that_was_not_read_is_not_taken_for_the_next_request() {
    let mut served = Served::start().await;
    for size in [35, 50_000] {
        let body = format!("{:size$}", "GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n");
        let mut connection = served.connect().await;
        let head = format!("GET /later HTTP/1.1\r\ncontent-length: {size}\r\n\r\n");
        connection.write_all(head.as_bytes()).await.unwrap();
        served.until_waiting(1).await;
        connection.write_all(body.as_bytes()).await.unwrap();
        served.answers.add_permits(1);
        read_until(&mut connection, "done", 1).await;
        // The server goes on after the body, or not at all.
        let _ = connection.write_all(b"GET /now HTTP/1.1\r\nconnection: close\r\n\r\n").await;
        let _ = within(connection.read_to_end(&mut Vec::new())).await;
    }
    assert!(served.asked().iter().all(|path| path != "/smuggled"), "{:?}", served.asked());
}

#[tokio::test]
async fn a_caller_that_hangs_up_is_forgotten() {
    let mut served = Served::start().await;
    for request in ["GET /later HTTP/1.1\r\n\r\n", "POST /later-read HTTP/1.1\r\ncontent-length: 1\r\n\r\n1"] {
        let mut connection = served.connect().await;
        connection.write_all(request.as_bytes()).await.unwrap();
        served.until_waiting(1).await;
        drop(connection);
        served.until_waiting(0).await;
    }
}

#[tokio::test]
async fn told_to_stop_it_answers_who_waits_and_takes_no_more() {
    let mut served = Served::start().await;
    let (mut waits, mut idle) = (served.connect().await, served.connect().await);
    waits.write_all(b"GET /later HTTP/1.1\r\n\r\n").await.unwrap();
    idle.write_all(b"GET /now HTTP/1.1\r\n\r\n").await.unwrap();
    read_until(&mut idle, "done", 1).await;
    served.until_waiting(1).await;
    served.stop.cancel();
    let mut said = String::new();
    within(waits.read_to_string(&mut said)).await.unwrap();
    assert!(said.contains("connection: close") && said.ends_with("done"), "{said}");
    assert_eq!(idle.read(&mut [0]).await.unwrap(), 0);
    served.server.await.unwrap();
    assert!(TcpStream::connect(served.addr).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn told_to_stop_it_does_not_wait_for_a_head_that_is_half_there() {
    let served = Served::start().await;
    let mut connection = served.connect().await;
    connection.write_all(b"GET /now HTTP/1.1\r\nhost").await.unwrap();
    served.stop.cancel();
    tokio::time::timeout(GRACE + Duration::from_secs(1), served.server).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_head_that_does_not_come_ends_the_connection() {
    let served = Served::start().await;
    for head in ["", "GET /now HTTP/1.1\r\nhost"] {
        let mut connection = served.connect().await;
        connection.write_all(head.as_bytes()).await.unwrap();
        let mut said = Vec::new();
        tokio::time::timeout(IDLE + Duration::from_secs(1), connection.read_to_end(&mut said)).await.unwrap().unwrap();
        assert_eq!(served.asked(), [""; 0]);
    }
}

#[tokio::test(start_paused = true)]
async fn who_takes_nothing_of_an_answer_is_cut_off() {
    let served = Served::start().await;
    let mut connection = served.connect().await;
    connection.write_all(b"GET /large HTTP/1.1\r\n\r\n").await.unwrap();
    connection.read_exact(&mut [0; 8]).await.unwrap();
    tokio::time::sleep(TAKEN_WITHIN + Duration::from_secs(1)).await;
    let mut rest = Vec::new();
    // The connection ends, with or without an error, before the whole answer was sent.
    let _ = connection.read_to_end(&mut rest).await;
    assert!(rest.len() < LARGE, "{}", rest.len());
}
