//! Known ways to bypass such guards, and the networks that must not be connected to.

use proptest::prelude::*;

use super::*;

fn settings(networks: &str, ports: &str) -> AddressSettings {
    AddressSettings { webhook_allow_networks: networks.parse().unwrap(), webhook_allow_ports: ports.parse().unwrap() }
}

fn guard(networks: &str, ports: &str) -> Guard {
    Guard::new(&settings(networks, ports))
}

fn judged(url: &str) -> Result<(), Forbidden> {
    guard("", "").check(&url.parse().unwrap())
}

/// Bypasses that are known from reports and from the lists that testers use.
#[test]
fn every_known_spelling_of_an_address_that_is_not_public_is_refused() {
    for host in [
        "127.0.0.1",
        "127.1",
        "127.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0x7f.0x0.0x0.0x1",
        "0177.0.0.1",
        "0177.0.0.01",
        "017700000001",
        "127.0.0.1.",
        "0",
        "0.0.0.0",
        "0x0",
        "00",
        "127.127.127.127",
        "127.000.000.001",
        "%31%32%37.0.0.1",
        "１２７.0.0.1",
        "①②⑦.⓪.⓪.①",
        "127。0。0。1",
        "10.0.0.0",
        "10.1.2.3",
        "167772161",
        "0xa000001",
        "012.1.2.3",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.0.1",
        "192.168.257",
        "3232235521",
        "169.254.169.254",
        "0xa9fea9fe",
        "2852039166",
        "0251.0376.0251.0376",
        "169.254.43518",
        "169.16689662",
        "168.63.129.16",
        "100.100.100.200",
        "100.64.0.1",
        "100.127.255.255",
        "192.0.0.1",
        "192.0.2.1",
        "192.31.196.1",
        "192.52.193.1",
        "192.88.99.1",
        "192.175.48.1",
        "198.18.0.1",
        "198.19.255.255",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "4294967295",
        "[::1]",
        "[0:0:0:0:0:0:0:1]",
        "[0000:0000:0000:0000:0000:0000:0000:0001]",
        "[::]",
        "[::127.0.0.1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[0:0:0:0:0:ffff:7f00:0001]",
        "[::ffff:0:127.0.0.1]",
        "[::ffff:169.254.169.254]",
        "[::ffff:8.8.8.8]",
        "[64:ff9b::7f00:1]",
        "[64:ff9b::8.8.8.8]",
        "[64:ff9b:1::1]",
        "[100::1]",
        "[2001::1]",
        "[2001:0:7f00:1::]",
        "[2001:10::1]",
        "[2001:20::1]",
        "[2001:2::1]",
        "[2001:db8::1]",
        "[2002:7f00:1::]",
        "[2002:a9fe:a9fe::]",
        "[2620:4f:8000::1]",
        "[3fff::1]",
        "[3fff:fff:ffff::1]",
        "[5f00::1]",
        "[fc00::1]",
        "[fd00:ec2::254]",
        "[fe80::1]",
        "[fec0::1]",
        "[ff02::1]",
        "[ff0e::1]",
        "[4000::1]",
        "[8000::1]",
        "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]",
    ] {
        assert_eq!(judged(&format!("http://{host}/")), Err(Forbidden::Address), "{host}");
        assert_eq!(judged(&format!("https://{host}:8443/x?y#z")), Err(Forbidden::Address), "{host}");
    }
}

#[test]
fn what_is_no_host_in_any_reading_does_not_even_parse() {
    for url in [
        "http://[fe80::1%25eth0]/",
        "http://[fe80::1%eth0]/",
        "http://[::1%25]/",
        "http://127.0.0.1.1/",
        "http://256.0.0.1/",
        "http://0x100000000/",
        "http://[::ffff:127.0.0.1.1]/",
        "http://[127.0.0.1]/",
        "http://",
        "http:// 127.0.0.1/",
        "http://127.0.0.1\0.example.com/",
    ] {
        assert!(url::Url::parse(url).is_err(), "{url}");
    }
}

#[test]
fn the_host_is_the_one_that_is_connected_to_wherever_the_tricks_with_other_parts_lead() {
    for (url, verdict) in [
        ("http://example.com@127.0.0.1/", Forbidden::Credentials),
        ("http://example.com:80@127.0.0.1/", Forbidden::Credentials),
        ("http://127.0.0.1@example.com/", Forbidden::Credentials),
        ("http://:secret@example.com/", Forbidden::Credentials),
        ("http:\\\\127.0.0.1\\", Forbidden::Address),
        ("http:127.0.0.1", Forbidden::Address),
        ("http:///127.0.0.1/", Forbidden::Address),
        ("http://127.0.0.1#@example.com/", Forbidden::Address),
        ("http://127.0.0.1\\@example.com/", Forbidden::Address),
        ("http://127.0.0.1?@example.com/", Forbidden::Address),
        ("HTTP://127.0.0.1/", Forbidden::Address),
        ("\thttp://127.\n0.0.1/", Forbidden::Address),
        ("file:///etc/passwd", Forbidden::Scheme),
        ("ftp://example.com/", Forbidden::Scheme),
        ("gopher://example.com:70/", Forbidden::Scheme),
        ("javascript:alert(1)", Forbidden::Scheme),
        ("unix:/run/docker.sock", Forbidden::Scheme),
    ] {
        assert_eq!(judged(url), Err(verdict), "{url}");
    }
}

#[test]
fn ports_of_other_services_are_refused_unless_they_are_allowed() {
    for port in [0, 1, 21, 22, 23, 25, 53, 79, 81, 110, 143, 442, 444, 465, 587, 993, 1023] {
        assert_eq!(judged(&format!("http://example.com:{port}/")), Err(Forbidden::Port), "{port}");
        assert_eq!(judged(&format!("https://93.184.216.34:{port}/")), Err(Forbidden::Port), "{port}");
    }
    for port in [80, 443, 1024, 8080, 65535] {
        assert_eq!(judged(&format!("http://example.com:{port}/")), Ok(()), "{port}");
    }
    assert_eq!(guard("", "81").check(&"http://example.com:81/".parse().unwrap()), Ok(()));
    assert_eq!(guard("127.0.0.0/8", "").check(&"http://127.0.0.1:81/".parse().unwrap()), Ok(()), "its network is allowed");
    assert_eq!(
        guard("127.0.0.0/8", "").check(&"http://localhost:81/".parse().unwrap()),
        Err(Forbidden::Port),
        "a name could lead anywhere"
    );
}

#[test]
fn public_addresses_and_names_pass() {
    for url in
        ["http://93.184.216.34/", "https://[2606:2800:220:1::1]/", "https://example.com/", "http://localhost/", "http://1.1.1.1:8080/"]
    {
        assert_eq!(judged(url), Ok(()), "{url}");
    }
}

#[test]
fn the_machines_own_addresses_are_refused_even_if_they_are_public() {
    let own: [IpAddr; 2] = ["93.184.216.34".parse().unwrap(), "2606:2800:220:1::1".parse().unwrap()];
    let on_it = |settings: &AddressSettings| {
        // Not too old before the test is over.
        let read = Interfaces { read_at: Instant::now() + Duration::from_hours(1), addresses: own.to_vec() };
        Guard { own: OwnAddresses(Arc::new(Mutex::new(Some(read)))), ..Guard::new(settings) }
    };
    let guarded = on_it(&AddressSettings::default());
    assert!(own.iter().all(|&address| !guarded.allows(address)));
    assert!(guarded.allows("93.184.216.35".parse().unwrap()));
    assert!(on_it(&settings("93.184.216.34/32", "")).allows(own[0]), "the operator may allow one");
    assert!(interfaces().unwrap().iter().any(IpAddr::is_loopback), "{:?}", interfaces());
}

#[test]
fn while_the_machine_does_not_say_what_its_addresses_are_the_last_ones_count_and_without_any_all_are_refused() {
    let (own, other): (IpAddr, IpAddr) = ("93.184.216.34".parse().unwrap(), "93.184.216.35".parse().unwrap());
    let mut known = None;
    believe(&mut known, None);
    assert!(may_be_own(known.as_ref(), own) && may_be_own(known.as_ref(), other));
    believe(&mut known, Some(vec![own]));
    believe(&mut known, None);
    assert!(may_be_own(known.as_ref(), own) && !may_be_own(known.as_ref(), other));
}

#[test]
fn every_spelling_of_a_host_is_one_address() {
    for spelling in [
        "http:example.com/1",
        "http:/example.com/1",
        "http:\\\\example.com\\1",
        "http://example.com:80/1",
        "http://example.com./1",
        "http://example.com.:80/1",
        "http://%65xample.com/1",
        "HTTP://EXAMPLE.com/1",
        "http://ｅxample。com/1",
    ] {
        assert_eq!(canonical(spelling.parse().unwrap()).as_str(), "http://example.com/1", "{spelling}");
    }
    assert_eq!(canonical("http://example.com.:8080/".parse().unwrap()).as_str(), "http://example.com:8080/");
    for url in ["http://127.0.0.1../", "http://0x7f.1.../"] {
        assert_eq!(guard("", "").check(&canonical(url.parse().unwrap())), Err(Forbidden::Address), "{url}");
    }
}

#[test]
fn lists_are_read_and_what_is_no_list_is_refused() {
    assert_eq!("10.0.0.0/8, ::1/128".parse::<Networks>().unwrap().0.len(), 2);
    assert!("10.0.0.0".parse::<Networks>().is_err() && "a".parse::<Networks>().is_err() && "".parse::<Networks>().unwrap().0.is_empty());
    assert_eq!("25, 81".parse::<Ports>().unwrap().0, [25, 81]);
    assert!("70000".parse::<Ports>().is_err() && "x".parse::<Ports>().is_err() && "".parse::<Ports>().unwrap().0.is_empty());
}

proptest! {
    #[test]
    fn no_address_inside_a_refused_network_is_allowed(index in 0..SPECIAL_V4.len(), host: u32) {
        let network = SPECIAL_V4[index];
        let address = Ipv4Addr::from(u32::from(network.network()) | host & u32::from(network.hostmask()));
        prop_assert!(!guard("", "").allows(address.into()));
        prop_assert!(!guard("", "").allows(address.to_ipv6_mapped().into()));
    }

    #[test]
    fn no_address_inside_a_refused_network_of_version_6_is_allowed(index in 0..SPECIAL_V6.len(), host: u128) {
        let network = SPECIAL_V6[index];
        let address = Ipv6Addr::from(u128::from(network.network()) | host & u128::from(network.hostmask()));
        prop_assert!(!guard("", "").allows(address.into()));
    }

    #[test]
    fn an_address_outside_of_global_unicast_is_refused(high in any::<u128>()) {
        let address = Ipv6Addr::from(high);
        prop_assume!(address.segments()[0] & 0xe000 != 0x2000);
        prop_assert!(!guard("", "").allows(address.into()));
    }

    /// However the number of an address is written, the verdict is the same.
    #[test]
    fn all_spellings_of_one_address_get_one_verdict(number: u32) {
        let guard = guard("", "");
        let [a, b, c, d] = number.to_be_bytes();
        let dotted = guard.check(&format!("http://{a}.{b}.{c}.{d}/").parse().unwrap());
        for host in [
            format!("{number}"), format!("{number:#x}"), format!("0{number:o}"), format!("{a:#x}.{b:#x}.{c:#x}.{d:#x}"),
            format!("0{a:o}.0{b:o}.0{c:o}.0{d:o}"), format!("{a}.{}", number & 0x00ff_ffff), format!("{a}.{b}.{}", number & 0xffff),
        ] {
            prop_assert_eq!(guard.check(&format!("http://{host}/").parse().unwrap()), dotted, "{}", host);
        }
    }
}
