//! Ports for servers that start later, or stop and start again on the same one.
//!
//! Asking the system for any port and letting go of it is a race: until the server listens, the port can become the near end of any
//! outgoing connection, or another test's. So ports are taken from below the range of those near ends, and each is kept reserved.

use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::sync::{Mutex, PoisonError};

use rand::seq::SliceRandom;

use crate::error::{Error, Result};

/// Below 32768, where Linux begins with the near ends of outgoing connections (`net.ipv4.ip_local_port_range`), and above what is
/// commonly given to services.
const PORTS: std::ops::Range<u16> = 20_000..32_768;

/// The UDP sockets that reserve ports. The number is the same, the port another, so the server can have its own; the system gives it to
/// one process only, and takes it back from one that is killed.
static RESERVED: Mutex<Vec<UdpSocket>> = Mutex::new(Vec::new());

/// A port of the loopback address that nobody listens on, and that no other call gets, here or in another process, as long as this
/// process lives.
///
/// # Errors
/// When all are taken.
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
    Err(Error::new(format!("every port of {PORTS:?} is taken")))
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
