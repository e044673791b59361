//! Injects every kind of fault once, against the real programs. This is a separate test binary, because Cargo runs test binaries one after
//! the other: callers are promised an answer within two seconds, and no other test must take the CPU from them.

use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn under_load_and_through_every_kind_of_fault_nothing_is_lost_and_every_promise_kept() {
    let report = devkit::chaos::run(1, Duration::ZERO, |line| println!("{line}")).await.unwrap();
    println!("{report}");
    assert_eq!(report.failures(), [""; 0]);
}
