//! Decides which addresses a webhook may be sent to.
//!
//! A tenant chooses the URL, so it could name a host that only our machines can reach. This module checks the parsed URL, which has only
//! one spelling whatever the tenant wrote, and every address that a name resolves to. The `api` runs the check when a request is posted, to
//! refuse a literal address at once. The `worker` runs it again for each connection, and that check is the one that counts (see
//! `worker/src/webhook`). The `api` learns from Postgres what the operator allows the `worker` (see `store::webhook_addresses`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Args;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use nix::ifaddrs::getifaddrs;

use crate::settings::list;

/// IPv4 networks that are not the public internet: IANA's special-purpose registry (RFC 6890 and its updates), multicast, and the metadata
/// service of Azure.
const SPECIAL_V4: [Ipv4Net; 18] = [
    v4([0, 0, 0, 0], 8),        // this network
    v4([10, 0, 0, 0], 8),       // private
    v4([100, 64, 0, 0], 10),    // carrier-grade NAT
    v4([127, 0, 0, 0], 8),      // loopback
    v4([168, 63, 129, 16], 32), // the metadata service of Azure, which is a public address by number only
    v4([169, 254, 0, 0], 16),   // link-local, and the metadata services of other clouds
    v4([172, 16, 0, 0], 12),    // private
    v4([192, 0, 0, 0], 24),     // protocol assignments
    v4([192, 0, 2, 0], 24),     // documentation
    v4([192, 31, 196, 0], 24),  // AS112
    v4([192, 52, 193, 0], 24),  // AMT
    v4([192, 88, 99, 0], 24),   // 6to4 relays
    v4([192, 168, 0, 0], 16),   // private
    v4([192, 175, 48, 0], 24),  // AS112, direct delegation
    v4([198, 18, 0, 0], 15),    // benchmarks
    v4([198, 51, 100, 0], 24),  // documentation
    v4([203, 0, 113, 0], 24),   // documentation
    v4([224, 0, 0, 0], 3),      // multicast, reserved, broadcast
];

/// IPv6 networks inside `2000::/3` that are not the public internet. Everything outside `2000::/3` is refused anyway.
const SPECIAL_V6: [Ipv6Net; 5] = [
    v6([0x2001, 0, 0], 23),         // protocol assignments: Teredo, benchmarks, ORCHID
    v6([0x2001, 0x0db8, 0], 32),    // documentation
    v6([0x2002, 0, 0], 16),         // 6to4
    v6([0x2620, 0x4f, 0x8000], 48), // AS112
    v6([0x3fff, 0, 0], 20),         // documentation
];

/// The only block of IPv6 from which IANA allocates global unicast addresses.
const GLOBAL_V6: Ipv6Net = v6([0x2000, 0, 0], 3);

const fn v4([a, b, c, d]: [u8; 4], bits: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), bits)
}

/// The network of an address that begins with these segments; the others are 0.
const fn v6([a, b, c]: [u16; 3], bits: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, 0, 0, 0, 0, 0), bits)
}

/// What the operator lets through.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Webhooks")]
pub struct AddressSettings {
    /// Networks that the address guard lets through, such as `127.0.0.0/8,::1/128`; empty: none.
    #[arg(long, env, default_value = "", hide_default_value = true)]
    pub webhook_allow_networks: Networks,
    /// Ports below 1024 that a webhook may go to besides 80 and 443, such as `81,444`; empty: none.
    #[arg(long, env, default_value = "", hide_default_value = true)]
    pub webhook_allow_ports: Ports,
}

/// A set of networks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks(pub Vec<IpNet>);

impl FromStr for Networks {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        list(text, |item| item.parse().ok(), "networks with commas between, such as 127.0.0.0/8,::1/128").map(Self)
    }
}

/// A set of ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ports(pub Vec<u16>);

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        list(text, |item| item.parse().ok().map(NonZeroU16::get), "ports with commas between, such as 81,444").map(Self)
    }
}

/// Why a webhook may not be sent to a URL. It reveals nothing about the network behind the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Forbidden {
    /// The scheme is neither `http` nor `https`.
    #[error("the scheme is not http or https")]
    Scheme,
    /// The URL contains a user name or a password.
    #[error("credentials in an address are not allowed")]
    Credentials,
    /// The port belongs to another service.
    #[error("the port is not allowed")]
    Port,
    /// The address is not on the public internet.
    #[error("the address is not allowed")]
    Address,
}

/// Allows public addresses, and whatever else the operator allows.
#[derive(Clone, Debug)]
pub struct Guard {
    allowed: Arc<[IpNet]>,
    ports: Arc<[u16]>,
    own: OwnAddresses,
}

impl Guard {
    /// Creates a guard from the settings, for this machine.
    #[must_use]
    pub fn new(settings: &AddressSettings) -> Self {
        let AddressSettings { webhook_allow_networks: Networks(allowed), webhook_allow_ports: Ports(ports) } = settings.clone();
        Self { allowed: allowed.into(), ports: ports.into(), own: OwnAddresses::default() }
    }

    /// A guard that also allows what `others` allow.
    #[must_use]
    pub fn allowing_also(&self, others: &AddressSettings) -> Self {
        Self {
            allowed: self.allowed.iter().chain(&others.webhook_allow_networks.0).copied().collect(),
            ports: self.ports.iter().chain(&others.webhook_allow_ports.0).copied().collect(),
            own: self.own.clone(),
        }
    }

    /// Whether `address` may be connected to.
    #[must_use]
    pub fn allows(&self, address: IpAddr) -> bool {
        self.has_leave(address) || is_public(address) && !self.own.contains(address)
    }

    fn has_leave(&self, address: IpAddr) -> bool {
        self.allowed.iter().any(|network| network.contains(&address))
    }

    /// Checks everything in a URL that needs no DNS look-up: scheme, credentials, port, and a literal address. A name passes; the resolver
    /// checks its addresses.
    ///
    /// # Errors
    /// If no webhook may be sent to `url`.
    pub fn check(&self, url: &url::Url) -> Result<(), Forbidden> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(Forbidden::Scheme);
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(Forbidden::Credentials);
        }
        let literal = match url.host() {
            Some(url::Host::Ipv4(address)) => Some(IpAddr::V4(address)),
            Some(url::Host::Ipv6(address)) => Some(IpAddr::V6(address)),
            Some(url::Host::Domain(_)) => None,
            None => return Err(Forbidden::Address),
        };
        if literal.is_some_and(|address| !self.allows(address)) {
            return Err(Forbidden::Address);
        }
        let port = url.port_or_known_default().unwrap_or_default();
        let usual = port >= 1024 || matches!(port, 80 | 443) || self.ports.contains(&port);
        if usual || literal.is_some_and(|address| self.has_leave(address)) { Ok(()) } else { Err(Forbidden::Port) }
    }
}

/// Returns the canonical spelling of a URL. The parser has already normalized case, slashes, escapes and the default port. This function
/// removes the dots that end an absolute name. Check its result, not the input: without these dots, a name can be a literal address.
#[must_use]
pub fn canonical(mut url: url::Url) -> url::Url {
    let shorter = url.domain().map(|name| name.trim_end_matches('.')).filter(|shorter| Some(*shorter) != url.domain());
    if let Some(shorter) = shorter.map(ToOwned::to_owned) {
        // A name that consists only of dots is left unchanged: it has no address.
        let _ = url.set_host(Some(&shorter));
    }
    url
}

fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => SPECIAL_V4.iter().all(|network| !network.contains(&address)),
        // An address that embeds another one (mapped, NAT64, 6to4, Teredo) is always refused: it lies outside `2000::/3` or in a special
        // network.
        IpAddr::V6(address) => GLOBAL_V6.contains(&address) && SPECIAL_V6.iter().all(|network| !network.contains(&address)),
    }
}

/// The machine's own addresses. Even a public one leads back to this machine, past every firewall in front of it.
#[derive(Clone, Debug, Default)]
struct OwnAddresses(Arc<Mutex<Option<Interfaces>>>);

/// The addresses of the interfaces, and when they were read.
#[derive(Debug)]
struct Interfaces {
    read_at: Instant,
    addresses: Vec<IpAddr>,
}

/// How long the addresses of the interfaces are used before they are read again. Addresses come and go.
const BELIEVED_FOR: Duration = Duration::from_secs(5);

impl OwnAddresses {
    fn contains(&self, address: IpAddr) -> bool {
        let mut read = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if read.as_ref().is_none_or(|known| known.read_at.elapsed() > BELIEVED_FOR) {
            believe(&mut read, interfaces());
        }
        may_be_own(read.as_ref(), address)
    }
}

/// Replaces the known addresses with those just read. If they could not be read, the last known ones stay.
fn believe(known: &mut Option<Interfaces>, addresses: Option<Vec<IpAddr>>) {
    if let Some(addresses) = addresses {
        *known = Some(Interfaces { read_at: Instant::now(), addresses });
    }
}

/// Until the addresses have been read once, any address may be one of ours.
fn may_be_own(known: Option<&Interfaces>, address: IpAddr) -> bool {
    known.is_none_or(|known| known.addresses.contains(&address))
}

/// The addresses of this machine. `None` if the system does not report them.
fn interfaces() -> Option<Vec<IpAddr>> {
    let all = getifaddrs().ok()?;
    let addresses = all
        .filter_map(|interface| interface.address)
        .filter_map(|address| {
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
        })
        .collect();
    Some(addresses)
}

#[cfg(test)]
mod tests;
