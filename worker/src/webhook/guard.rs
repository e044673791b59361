//! Which addresses a webhook may be sent to.
//!
//! A tenant chooses the address, so it could name a host that only this process can reach. The guard is the resolver of the HTTP
//! client: what it answers is what is connected to, so a name can't change between the check and the connection. A literal address
//! never reaches a resolver and is judged from the parsed URL, which has one spelling only, whatever the tenant wrote.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, LazyLock};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use crate::settings::Networks;

/// What is not the public internet, version 4: the special-purpose registry of IANA (RFC 6890 and its updates), and multicast.
const SPECIAL_V4: [(Ipv4Addr, u8); 16] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),       // this network
    (Ipv4Addr::new(10, 0, 0, 0), 8),      // private
    (Ipv4Addr::new(100, 64, 0, 0), 10),   // carrier-grade NAT
    (Ipv4Addr::new(127, 0, 0, 0), 8),     // loopback
    (Ipv4Addr::new(169, 254, 0, 0), 16),  // link-local, and the metadata services of clouds
    (Ipv4Addr::new(172, 16, 0, 0), 12),   // private
    (Ipv4Addr::new(192, 0, 0, 0), 24),    // protocol assignments
    (Ipv4Addr::new(192, 0, 2, 0), 24),    // documentation
    (Ipv4Addr::new(192, 31, 196, 0), 24), // AS112
    (Ipv4Addr::new(192, 52, 193, 0), 24), // AMT
    (Ipv4Addr::new(192, 88, 99, 0), 24),  // 6to4 relays
    (Ipv4Addr::new(192, 168, 0, 0), 16),  // private
    (Ipv4Addr::new(198, 18, 0, 0), 15),   // benchmarks
    (Ipv4Addr::new(198, 51, 100, 0), 24), // documentation
    (Ipv4Addr::new(203, 0, 113, 0), 24),  // documentation
    (Ipv4Addr::new(224, 0, 0, 0), 3),     // multicast, reserved, broadcast
];

/// What of version 6 is not the public internet, inside `2000::/3`; everything outside of it is refused anyway.
const SPECIAL_V6: [(Ipv6Addr, u8); 5] = [
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23), // protocol assignments: Teredo, benchmarks, ORCHID
    (Ipv6Addr::new(0x2001, 0x0db8, 0, 0, 0, 0, 0, 0), 32), // documentation
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16), // 6to4
    (Ipv6Addr::new(0x2620, 0x4f, 0x8000, 0, 0, 0, 0, 0), 48), // AS112
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20), // documentation
];

/// Global unicast, the only part of version 6 that IANA has given out.
const GLOBAL_V6: (Ipv6Addr, u8) = (Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);

static REFUSED_V4: LazyLock<Vec<Ipv4Net>> =
    LazyLock::new(|| SPECIAL_V4.iter().map(|&(network, bits)| Ipv4Net::new_assert(network, bits)).collect());
static REFUSED_V6: LazyLock<Vec<Ipv6Net>> =
    LazyLock::new(|| SPECIAL_V6.iter().map(|&(network, bits)| Ipv6Net::new_assert(network, bits)).collect());

/// Lets public addresses through, and the networks that the operator allows.
#[derive(Clone, Debug, Default)]
pub struct Guard {
    allowed: Arc<[IpNet]>,
}

/// An address that a webhook may not be sent to. Says nothing about which one, or why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the address is not allowed")]
pub struct Forbidden;

impl Guard {
    /// A guard that also lets `networks` through.
    #[must_use]
    pub fn new(networks: &Networks) -> Self {
        Self { allowed: networks.0.clone().into() }
    }

    /// Whether `address` may be connected to.
    #[must_use]
    pub fn allows(&self, address: IpAddr) -> bool {
        self.allowed.iter().any(|network| network.contains(&address)) || is_public(address)
    }

    /// Judges a literal address; a name passes, for the resolver to judge.
    ///
    /// # Errors
    /// If the URL holds an address that may not be connected to.
    pub fn check_literal(&self, url: &url::Url) -> Result<(), Forbidden> {
        let literal = match url.host() {
            Some(url::Host::Ipv4(address)) => IpAddr::V4(address),
            Some(url::Host::Ipv6(address)) => IpAddr::V6(address),
            Some(url::Host::Domain(_)) => return Ok(()),
            None => return Err(Forbidden),
        };
        if self.allows(literal) { Ok(()) } else { Err(Forbidden) }
    }
}

fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => REFUSED_V4.iter().all(|network| !network.contains(&address)),
        // An address that carries another one inside (mapped, NAT64, 6to4, Teredo) is refused whole: it lies outside of 2000::/3 or in
        // one of the special ranges.
        IpAddr::V6(address) => {
            Ipv6Net::new_assert(GLOBAL_V6.0, GLOBAL_V6.1).contains(&address) && REFUSED_V6.iter().all(|network| !network.contains(&address))
        }
    }
}

impl Resolve for Guard {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = self.clone();
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let allowed: Vec<SocketAddr> = found.filter(|address| guard.allows(address.ip())).collect();
            if allowed.is_empty() {
                return Err(Forbidden.into());
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refuses(url: &str) -> bool {
        Guard::default().check_literal(&url.parse().unwrap()).is_err()
    }

    #[test]
    fn addresses_that_are_not_public_are_refused_in_every_spelling() {
        for url in [
            "http://127.0.0.1/",
            "http://127.1/",
            "http://2130706433/",
            "http://0x7f000001/",
            "http://0177.0.0.1/",
            "http://0/",
            "http://10.1.2.3/",
            "http://172.31.255.255/",
            "http://192.168.0.1/",
            "http://169.254.169.254/latest/meta-data/",
            "http://100.64.0.1/",
            "http://192.0.2.1/",
            "http://198.18.0.1/",
            "http://224.0.0.1/",
            "http://255.255.255.255/",
            "http://[::1]/",
            "http://[::]/",
            "http://[::ffff:127.0.0.1]/",
            "http://[::ffff:7f00:1]/",
            "http://[::127.0.0.1]/",
            "http://[fe80::1]/",
            "http://[fc00::1]/",
            "http://[ff02::1]/",
            "http://[64:ff9b::7f00:1]/",
            "http://[2002:7f00:1::]/",
            "http://[2001::1]/",
            "http://[2001:db8::1]/",
            "http://[100::1]/",
            "http://[3fff::1]/",
        ] {
            assert!(refuses(url), "{url}");
        }
    }

    #[test]
    fn public_addresses_and_names_pass() {
        for url in ["http://93.184.216.34/", "https://[2606:2800:220:1::1]/", "https://example.com/", "http://localhost/"] {
            assert!(!refuses(url), "{url}");
        }
    }

    #[tokio::test]
    async fn a_name_that_resolves_to_a_refused_address_is_not_connected_to() {
        let resolved = Guard::default().resolve("localhost".parse().unwrap()).await;
        assert!(resolved.is_err_and(|error| error.downcast_ref::<Forbidden>().is_some()));
        let guard = Guard::new(&"127.0.0.0/8,::1/128".parse().unwrap());
        assert!(guard.resolve("localhost".parse().unwrap()).await.unwrap().all(|address| address.ip().is_loopback()));
    }

    proptest! {
        #[test]
        fn no_address_inside_a_refused_network_is_allowed(index in 0..SPECIAL_V4.len(), host: u32) {
            let (network, bits) = SPECIAL_V4[index];
            let mask = u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
            let address = Ipv4Addr::from(u32::from(network) & mask | host & !mask);
            prop_assert!(!Guard::default().allows(address.into()));
            prop_assert!(!Guard::default().allows(address.to_ipv6_mapped().into()));
        }

        #[test]
        fn an_address_outside_of_global_unicast_is_refused(high in any::<u128>()) {
            let address = Ipv6Addr::from(high);
            prop_assume!(address.segments()[0] & 0xe000 != 0x2000);
            prop_assert!(!Guard::default().allows(address.into()));
        }
    }
}
