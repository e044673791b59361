//! Ports for servers that start later, or that stop and start again on the same port.
//!
//! Asking the system for any port and releasing it is a race: until the server listens, the port can become the local port of an outgoing
//! connection, or another test can take it. So ports are taken from below the ephemeral range, and each one stays reserved.

use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, anyhow};
use rand::seq::SliceRandom;

/// Below 32768, where the ephemeral ports of Linux begin (`net.ipv4.ip_local_port_range`), and above the ports that services commonly use.
const PORTS: std::ops::Range<u16> = 20_000..32_768;

/// UDP sockets that reserve the TCP ports of the same numbers. The server can still bind its TCP port. The system gives a UDP port to one
/// process only, and releases it when that process ends, even if it is killed.
static RESERVED: Mutex<Vec<UdpSocket>> = Mutex::new(Vec::new());

/// Returns a free port of the loopback address.
///
/// No other call returns the same port, in this process or in another one, as long as this process lives.
///
/// # Errors
/// If all ports are taken.
pub fn free_port() -> Result<u16> {
    let mut candidates: Vec<u16> = PORTS.collect();
    candidates.shuffle(&mut rand::rng());
    for port in candidates {
        let Ok(reservation) = UdpSocket::bind((Ipv4Addr::LOCALHOST, port)) else { continue };
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            RESERVED.lock().unwrap_or_else(PoisonError::into_inner).push(reservation);
            return Ok(port);
        }
    }
    Err(anyhow!("every port of {PORTS:?} is taken"))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_port_is_free_and_given_once_and_is_no_near_end_of_a_connection() {
        let taken: Vec<u16> = (0..50).map(|_| free_port().unwrap()).collect();
        assert_eq!(taken.iter().collect::<HashSet<_>>().len(), taken.len());
        let listeners: Vec<TcpListener> = taken.iter().map(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).unwrap()).collect();
        assert!(taken.iter().all(|port| UdpSocket::bind((Ipv4Addr::LOCALHOST, *port)).is_err()), "another process would take it too");
        let connections: Vec<_> = listeners.iter().map(|it| std::net::TcpStream::connect(it.local_addr().unwrap()).unwrap()).collect();
        assert!(connections.iter().all(|connection| !PORTS.contains(&connection.local_addr().unwrap().port())));
    }
}
