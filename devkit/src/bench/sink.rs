//! A server that records calls and answers them at once or after a fixed time: the upstream and the receiver of the benchmarks.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};

use crate::wire::{self, Handler, Reply, Server};

/// A running sink. Dropping it stops it.
pub(super) struct Sink {
    server: Server,
    service: Arc<Service>,
}

#[derive(Debug)]
struct Service {
    latency: Duration,
    calls: AtomicU64,
    keeps_arrivals: AtomicBool,
    first: Mutex<Option<Instant>>,
    arrivals: Mutex<Vec<(String, SystemTime)>>,
}

impl Sink {
    /// Starts a sink that takes this long to answer.
    pub(super) async fn start(latency: Duration) -> Result<Self> {
        let service = Arc::new(Service {
            latency,
            calls: AtomicU64::new(0),
            keeps_arrivals: AtomicBool::new(false),
            first: Mutex::default(),
            arrivals: Mutex::default(),
        });
        let server = Server::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), Arc::clone(&service)).await?;
        Ok(Self { server, service })
    }

    /// The address that it listens on.
    pub(super) fn addr(&self) -> SocketAddr {
        self.server.addr()
    }

    /// Its URL, without a path.
    pub(super) fn url(&self) -> String {
        format!("http://{}", self.addr())
    }

    /// The number of calls so far.
    pub(super) fn calls(&self) -> u64 {
        self.service.calls.load(Ordering::Relaxed)
    }

    /// When the first call arrived.
    pub(super) fn first(&self) -> Option<Instant> {
        *self.service.first.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records arrivals from now on, by the system clock, which Postgres uses, too.
    pub(super) fn keep_arrivals(&self) {
        self.service.keeps_arrivals.store(true, Ordering::Relaxed);
    }

    /// The path and query of each recorded call, and when its head was read.
    pub(super) fn arrivals(&self) -> Vec<(String, SystemTime)> {
        self.service.arrivals.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Handler for Service {
    async fn handle(self: Arc<Self>, request: Request<Incoming>) -> Reply {
        if self.calls.fetch_add(1, Ordering::Relaxed) == 0 {
            *self.first.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
        if self.keeps_arrivals.load(Ordering::Relaxed) {
            let arrival = (request.uri().to_string(), SystemTime::now());
            self.arrivals.lock().unwrap_or_else(PoisonError::into_inner).push(arrival);
        }
        let signs = request.method() == Method::GET;
        if wire::read(request.into_body()).await.is_err() {
            return Reply::Close;
        }
        if !self.latency.is_zero() {
            tokio::time::sleep(self.latency).await;
        }
        Reply::Answer(wire::text(StatusCode::OK, if signs { "c2lnbmF0dXJl" } else { "" }))
    }
}
