//! Connections to the upstream: kept only where calls are frequent, and reused only for a short time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use devkit::upstream::SimulatorOptions;
use shared::contract::Status;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::world::{World, numbered};

/// An upstream that signs everything, and closes each connection without notice after a number of answers.
struct Counting {
    addr: SocketAddr,
    connections: Arc<AtomicUsize>,
    _task: JoinSet<()>,
}

impl Counting {
    async fn start(answers: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (addr, connections) = (listener.local_addr().unwrap(), Arc::<AtomicUsize>::default());
        let (count, mut task) = (Arc::clone(&connections), JoinSet::new());
        task.spawn(async move {
            let mut served = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                count.fetch_add(1, Ordering::SeqCst);
                served.spawn(answer(stream, answers));
            }
        });
        Self { addr, connections, _task: task }
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    fn url(&self) -> String {
        format!("http://{}", self.addr)
    }
}

async fn answer(stream: TcpStream, answers: usize) {
    let mut stream = BufReader::new(stream);
    for _ in 0..answers {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if stream.read_line(&mut head).await.is_ok_and(|read| read > 0) {
                continue;
            }
            return;
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nc2ln").await.unwrap();
    }
}

#[tokio::test]
async fn connections_to_the_upstream_are_kept_only_where_calls_come_fast() {
    for (rate, kept) in [("10/1s", false), ("1000/1s", true)] {
        let world = World::new(SimulatorOptions::reliable(), rate).await;
        let upstream = Counting::start(usize::MAX).await;
        let _worker = world.worker(&[("UPSTREAM_URL", &upstream.url()), ("WORKER_QUEUES", "sign")]);
        for message in numbered(8) {
            let ids = world.post([message]).await;
            world.settled(&ids).await;
        }
        let connections = upstream.connections();
        assert_eq!(connections < 8, kept, "{rate}: {connections} connections");
        assert!(connections <= 8);
    }
}

#[tokio::test]
async fn an_upstream_that_closes_connections_without_a_word_costs_tries_but_no_signature() {
    let world = World::new(SimulatorOptions::reliable(), "1000/1s").await;
    let upstream = Counting::start(1).await;
    let _worker = world.worker(&[("UPSTREAM_URL", &upstream.url()), ("WORKER_QUEUES", "sign")]);
    let ids = world.post(numbered(300)).await;
    let states = world.settled(&ids).await;
    assert!(states.iter().all(|state| state.status == Status::Signed));
    println!("{} calls for 300 signatures", states.iter().map(|state| state.attempts).sum::<u32>());
}
