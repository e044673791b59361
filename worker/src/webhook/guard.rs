//! The address guard as the resolver of the HTTP client, where it counts. The client connects to what the resolver returns, so a name can't
//! change between the check and the connection. A literal address never reaches a resolver and is checked in the parsed URL (see
//! [`shared::address_guard`]). Redirects would bypass both checks, and are not followed.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;

use futures_util::future::BoxFuture;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use shared::address_guard::{Forbidden, Guard};
use tokio::sync::Semaphore;

/// Resolves names to addresses.
pub trait LookUp: Send + Sync + 'static {
    /// Returns all addresses of `name`, in the order in which to try them.
    fn look_up(&self, name: &str) -> BoxFuture<'static, io::Result<Vec<IpAddr>>>;
}

/// Maximum number of look-ups at a time: half of the threads that the runtime has for what blocks. A look-up can't be cancelled. One that
/// nobody waits for any more still has its thread until the name server's silence is long enough for the operating system. Without a limit,
/// names of one tenant could take all threads, and the upstream's name would wait for one.
const LOOK_UPS: usize = 256;

/// The operating system's resolver.
#[derive(Clone, Debug)]
pub struct System {
    free: Arc<Semaphore>,
    ask: fn(&str) -> io::Result<Vec<IpAddr>>,
}

impl Default for System {
    fn default() -> Self {
        let ask = |name: &str| Ok((name, 0).to_socket_addrs()?.map(|address| address.ip()).collect());
        Self { free: Arc::new(Semaphore::new(LOOK_UPS)), ask }
    }
}

impl LookUp for System {
    fn look_up(&self, name: &str) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> {
        let (name, ask, free) = (name.to_owned(), self.ask, Arc::clone(&self.free));
        Box::pin(async move {
            let permit = free.acquire_owned().await.map_err(io::Error::other)?;
            let looking_up = tokio::task::spawn_blocking(move || {
                let found = ask(&name);
                drop(permit);
                found
            });
            looking_up.await.map_err(io::Error::other)?
        })
    }
}

/// A resolver that returns only addresses that the guard allows.
pub struct GuardedResolver {
    guard: Guard,
    look_up: Arc<dyn LookUp>,
}

impl GuardedResolver {
    /// Creates a resolver that returns what `look_up` finds and `guard` allows.
    pub fn new(guard: Guard, look_up: impl LookUp) -> Self {
        Self { guard, look_up: Arc::new(look_up) }
    }
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (guard, found) = (self.guard.clone(), self.look_up.look_up(name.as_str()));
        Box::pin(async move {
            // To the tenant, a name that does not exist and one that leads to a forbidden address look the same. Otherwise a tenant could
            // probe for names in the operator's own network.
            let allowed: Vec<SocketAddr> = found
                .await
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
    use std::time::Duration;

    use futures_util::FutureExt;
    use proptest::prelude::*;
    use shared::address_guard::AddressSettings;
    use tokio::net::TcpListener;

    use super::*;

    struct Fixed(Vec<IpAddr>);

    impl LookUp for Fixed {
        fn look_up(&self, _: &str) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> {
            let addresses = self.0.clone();
            Box::pin(async move { Ok(addresses) })
        }
    }

    fn guard(networks: &str) -> Guard {
        Guard::with_own(&AddressSettings { webhook_allow_networks: networks.parse().unwrap(), ..AddressSettings::default() }, &[])
    }

    #[tokio::test]
    async fn a_name_that_does_not_exist_and_one_that_leads_to_a_forbidden_address_fail_alike() {
        let resolve = async |name: &str| {
            let resolved = GuardedResolver::new(guard(""), System::default()).resolve(name.parse().unwrap()).await;
            *resolved.err().unwrap().downcast::<Forbidden>().unwrap()
        };
        assert_eq!(resolve("localhost").await, Forbidden::Address);
        assert_eq!(resolve("does-not-exist.invalid").await, Forbidden::Address);
        let allowed = GuardedResolver::new(guard("127.0.0.0/8,::1/128"), System::default()).resolve("localhost".parse().unwrap()).await;
        assert!(allowed.unwrap().all(|address| address.ip().is_loopback()));
    }

    #[tokio::test]
    async fn a_look_up_that_nobody_waits_for_still_counts_until_it_ends() {
        static ANSWERS: std::sync::Mutex<()> = std::sync::Mutex::new(());
        let silent = ANSWERS.lock().unwrap();
        let ask = |_: &str| {
            drop(ANSWERS.lock());
            Ok(Vec::new())
        };
        let system = System { free: Arc::new(Semaphore::new(2)), ask };
        for name in ["one", "two"] {
            // Polled once, and given up.
            assert!(system.look_up(name).now_or_never().is_none());
        }
        assert_eq!(system.free.available_permits(), 0);
        assert!(system.look_up("three").now_or_never().is_none());
        drop(silent);
        assert!(system.look_up("four").await.unwrap().is_empty());
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
            let client = client.dns_resolver(GuardedResolver::new(guard.clone(), Fixed(addresses.clone()))).build().unwrap();
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
