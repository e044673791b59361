//! The address guard as the resolver of the HTTP client, where it counts. The client connects to what the resolver returns, so a name can't
//! change between the check and the connection. A literal address never reaches a resolver and is checked in the parsed URL (see
//! [`shared::address_guard`]). Redirects would bypass both checks, and are not followed.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use shared::address_guard::{Forbidden, Guard};
use tokio::sync::Semaphore;

/// Maximum number of look-ups at a time: half of the threads that the runtime has for what blocks. A look-up can't be cancelled. One that
/// nobody waits for any more still has its thread until the name server's silence is long enough for the operating system. Without a limit,
/// names of one tenant could take all threads, and the upstream's name would wait for one.
const LOOK_UPS: usize = 256;

/// Returns all addresses of a name, in the order in which to try them. Blocks.
type LookUp = dyn Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync;

/// A resolver that returns only addresses that the guard allows.
pub struct GuardedResolver {
    guard: Guard,
    look_up: Arc<LookUp>,
    free: Arc<Semaphore>,
}

impl GuardedResolver {
    /// Creates a resolver that returns what the operating system finds and `guard` allows.
    pub fn new(guard: Guard) -> Self {
        Self::looking_up(guard, LOOK_UPS, |name| Ok((name, 0).to_socket_addrs()?.map(|address| address.ip()).collect()))
    }

    /// The same, with another way to look up names, and with another limit.
    fn looking_up(guard: Guard, at_once: usize, look_up: impl Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync + 'static) -> Self {
        Self { guard, look_up: Arc::new(look_up), free: Arc::new(Semaphore::new(at_once)) }
    }
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (guard, look_up, free) = (self.guard.clone(), Arc::clone(&self.look_up), Arc::clone(&self.free));
        Box::pin(async move {
            let permit = free.acquire_owned().await?;
            let looking_up = tokio::task::spawn_blocking(move || {
                let found = look_up(name.as_str());
                drop(permit);
                found
            });
            // To the tenant, a name that does not exist and one that leads to a forbidden address look the same. Otherwise a tenant could
            // probe for names in the operator's own network.
            let allowed: Vec<SocketAddr> = looking_up
                .await?
                .unwrap_or_default()
                .into_iter()
                .filter(|address| guard.allows(*address))
                .map(|address| SocketAddr::new(address, 0))
                .collect();
            if allowed.is_empty() {
                return Err(Forbidden::Address.into());
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::sync::Mutex;
    use std::time::Duration;

    use futures_util::FutureExt;
    use proptest::prelude::*;
    use shared::address_guard::AddressSettings;
    use tokio::net::TcpListener;

    use super::*;

    fn guard(networks: &str) -> Guard {
        Guard::new(&AddressSettings { webhook_allow_networks: networks.parse().unwrap(), ..AddressSettings::default() })
    }

    #[tokio::test]
    async fn a_name_that_does_not_exist_and_one_that_leads_to_a_forbidden_address_fail_alike() {
        let resolve = async |name: &str| {
            let resolved = GuardedResolver::new(guard("")).resolve(name.parse().unwrap()).await;
            *resolved.err().unwrap().downcast::<Forbidden>().unwrap()
        };
        assert_eq!(resolve("localhost").await, Forbidden::Address);
        assert_eq!(resolve("does-not-exist.invalid").await, Forbidden::Address);
        let allowed = GuardedResolver::new(guard("127.0.0.0/8,::1/128")).resolve("localhost".parse().unwrap()).await;
        assert!(allowed.unwrap().all(|address| address.ip().is_loopback()));
    }

    #[tokio::test]
    async fn a_look_up_that_nobody_waits_for_still_counts_until_it_ends() {
        let silence = Arc::new(Mutex::new(()));
        let silent = silence.lock().unwrap();
        let name_server = Arc::clone(&silence);
        let resolver = GuardedResolver::looking_up(guard(""), 2, move |_| {
            drop(name_server.lock());
            Ok(Vec::new())
        });
        let resolve = |name: &str| resolver.resolve(name.parse().unwrap());
        for name in ["one", "two"] {
            // Polled once, and given up.
            assert!(resolve(name).now_or_never().is_none());
        }
        assert_eq!(resolver.free.available_permits(), 0);
        assert!(resolve("three").now_or_never().is_none());
        drop(silent);
        assert!(resolve("four").await.err().unwrap().is::<Forbidden>());
    }

    /// Makes real connections: a listener on every loopback address sees which ones the client connects to.
    #[test]
    fn no_address_in_a_denied_range_is_ever_connected_to() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        shared::tls::use_ring();
        // Of 127.0.0.0/8, which is denied, only 127.2.0.0/16 is allowed. The other networks are denied anyway.
        let denied = prop_oneof![
            any::<[u8; 2]>().prop_map(|[c, d]| IpAddr::from([127, 1, c, d])),
            any::<[u8; 3]>().prop_map(|[b, c, d]| IpAddr::from([10, b, c, d])),
            any::<[u8; 2]>().prop_map(|[c, d]| IpAddr::from([169, 254, c, d])),
            any::<[u8; 2]>().prop_map(|[c, d]| IpAddr::from(Ipv4Addr::new(127, 1, c, d).to_ipv6_mapped())),
            Just(IpAddr::from([0, 0, 0, 0])),
            Just("::".parse().unwrap()),
            Just("::1".parse().unwrap()),
        ];
        let allowed = any::<[u8; 2]>().prop_map(|[c, d]| IpAddr::from([127, 2, c, d]));
        let addresses = proptest::collection::vec(prop_oneof![3 => denied, 1 => allowed], 0..6);
        let mut runner =
            proptest::test_runner::TestRunner::new(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() });
        let (port, connected) = runtime.block_on(async {
            let (seen, connected) = tokio::sync::mpsc::unbounded_channel();
            let v6 = TcpListener::bind("[::]:0").await.unwrap();
            let port = v6.local_addr().unwrap().port();
            // On Linux, `::` also accepts IPv4, unless the system is configured otherwise.
            let v4 = TcpListener::bind(("0.0.0.0", port)).await.ok();
            for listener in std::iter::once(v6).chain(v4) {
                let seen = seen.clone();
                tokio::spawn(async move {
                    while let Ok((stream, _)) = listener.accept().await {
                        let _ = seen.send(stream.local_addr().unwrap().ip().to_canonical());
                    }
                });
            }
            (port, connected)
        });
        let guard = guard("127.2.0.0/16");
        let connected = std::cell::RefCell::new(connected);
        // The client looks for a runtime when it is built.
        let _entered = runtime.enter();
        let outcome = runner.run(&addresses, |addresses| {
            let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5));
            let client = client
                .dns_resolver(GuardedResolver::looking_up(guard.clone(), 1, {
                    let addresses = addresses.clone();
                    move |_| Ok(addresses.clone())
                }))
                .build()
                .unwrap();
            let any_allowed = addresses.iter().any(|address| guard.allows(*address));
            // The listener closes the connection, so the request fails in any case.
            let sent = runtime.block_on(client.post(format!("http://receiver.example:{port}/")).send());
            prop_assert!(sent.is_err());
            let first = if any_allowed { runtime.block_on(connected.borrow_mut().recv()) } else { None };
            for address in first.into_iter().chain(std::iter::from_fn(|| connected.borrow_mut().try_recv().ok())) {
                prop_assert!(guard.allows(address) && addresses.contains(&address), "connected to {address}, given {addresses:?}");
            }
            Ok(())
        });
        outcome.unwrap();
    }
}
