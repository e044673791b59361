//! The outcome of a run: the table, and the failures, if any.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::faults::Overcome;
use super::load::ANSWER_WITHIN;
use super::plan::Kind;
use super::record::Tables;
use crate::report::{new_table, percentile, right};

/// The figures of one run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub(super) seed: u64,
    pub(super) lasted: Duration,
    pub(super) accepted: usize,
    pub(super) signed: usize,
    pub(super) failed: usize,
    /// Signatures that do not verify at the upstream.
    pub(super) wrong_signatures: usize,
    /// Requests whose webhook was received, verified and answered 2xx.
    pub(super) delivered: usize,
    /// Requests whose webhook was given up and is kept.
    pub(super) kept: usize,
    pub(super) unverified: usize,
    /// In ascending order.
    pub(super) answered_in: Vec<Duration>,
    pub(super) refused: usize,
    pub(super) excused: usize,
    pub(super) late: Vec<String>,
    pub(super) unanswered: Vec<String>,
    pub(super) tables: Tables,
    /// Results that came too late and changed nothing.
    pub(super) fenced_off: usize,
    pub(super) calls: u64,
    pub(super) max_in_window: u64,
    pub(super) limit: u64,
    pub(super) over_budget: u64,
    pub(super) max_in_flight: u64,
    /// Calls for messages that the upstream had already signed.
    pub(super) repeated: u64,
    pub(super) faults: Vec<Overcome>,
}

impl Report {
    /// The failures; empty if all is well.
    #[must_use]
    pub fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        let mut check = |wrong: bool, what: String| {
            if wrong {
                failures.push(what);
            }
        };
        let tables = &self.tables;
        check(self.accepted == 0 || self.faults.is_empty(), "nothing happened".to_owned());
        check(self.lost() > 0, format!("{} requests lost", self.lost()));
        let rows = usize::try_from(tables.requests).unwrap_or_default();
        check(rows != self.accepted, format!("{rows} requests stored for {} callers", self.accepted));
        check(self.wrong_signatures > 0, format!("{} signatures that the upstream never gave", self.wrong_signatures));
        let untold = self.accepted.saturating_sub(self.delivered + self.kept);
        check(untold > 0, format!("{untold} webhooks neither delivered nor kept"));
        check(self.unverified > 0, format!("{} webhooks that do not verify", self.unverified));
        check(
            self.max_in_window > self.limit || self.over_budget > 0,
            format!("{} calls in one window, {} allowed", self.max_in_window, self.limit),
        );
        check(self.max_in_window < self.limit, "no window was ever full: the budget was not put to the test".to_owned());
        check(self.max_in_flight > 1, format!("{} calls under way at once for one message", self.max_in_flight));
        check(
            !self.late.is_empty(),
            format!("{} POSTs answered after more than {ANSWER_WITHIN:?}: {}", self.late.len(), self.late.join(", ")),
        );
        check(!self.unanswered.is_empty(), format!("{} POSTs without an answer: {}", self.unanswered.len(), self.unanswered.join(", ")));
        check(tables.results == 0, "no result was recorded".to_owned());
        check(tables.unfenced > 0, format!("{} results written by a process that had not the lease", tables.unfenced));
        let unexplained = tables.succeeded_without_a_successful_attempt;
        check(unexplained > 0, format!("{unexplained} jobs that succeeded, but not by exactly one attempt"));
        failures
    }

    fn lost(&self) -> usize {
        self.accepted.saturating_sub(self.signed + self.failed)
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [p50, p99, longest] = [50.0, 99.0, 100.0].map(|per_cent| seconds(percentile(&self.answered_in, per_cent)));
        let rows = [
            ("seed", self.seed.to_string()),
            ("lasted", format!("{:.0?}", Duration::from_secs(self.lasted.as_secs()))),
            ("requests accepted = signed + failed", format!("{} = {} + {}", self.accepted, self.signed, self.failed)),
            ("requests lost", self.lost().to_string()),
            ("webhooks delivered and verified / given up and kept", format!("{} / {}", self.delivered, self.kept)),
            ("most calls in any window / allowed", format!("{} / {}", self.max_in_window, self.limit)),
            ("most calls under way at once for one message", self.max_in_flight.to_string()),
            ("POSTs answered, of them 503", format!("{}, {}", self.answered_in.len(), self.refused)),
            ("  answered in: p50 / p99 / max", format!("{p50} / {p99} / {longest}")),
            ("  answered late / not at all", format!("{} / {}", self.late.len(), self.unanswered.len())),
            ("  not counted: the process was killed or stood still", self.excused.to_string()),
            ("results written / without the lease", format!("{} / {}", self.tables.results, self.tables.unfenced)),
            ("results that came too late and changed nothing", self.fenced_off.to_string()),
            ("attempts without an outcome, by kills and lost leases", self.tables.open_attempts.to_string()),
            ("upstream calls / repeated for a message it had signed", format!("{} / {}", self.calls, self.repeated)),
        ];
        let mut table = new_table();
        for (what, value) in rows {
            table.add_row([what.to_owned(), value]);
        }
        right(&mut table, 1);
        writeln!(f, "{table}")?;

        let mut table = new_table();
        table.set_header(["fault", "times", "recovered: mean", "slowest"]);
        let mut kinds: BTreeMap<Kind, Vec<Duration>> = BTreeMap::new();
        for fault in &self.faults {
            kinds.entry(fault.kind).or_default().push(fault.recovered_in);
        }
        for (kind, times) in kinds {
            let mean = times.iter().sum::<Duration>() / u32::try_from(times.len()).unwrap_or(u32::MAX);
            let slowest = times.iter().max().copied().unwrap_or_default();
            table.add_row([kind.to_string(), times.len().to_string(), seconds(mean), seconds(slowest)]);
        }
        right(&mut table, 1);
        writeln!(f, "{table}")?;
        match self.failures() {
            failures if failures.is_empty() => write!(f, "nothing lost, never over the budget, nothing written without its lease"),
            failures => write!(f, "failed: {}", failures.join("; ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Report {
        Report {
            accepted: 3,
            signed: 2,
            failed: 1,
            delivered: 2,
            kept: 1,
            max_in_window: 10,
            limit: 10,
            max_in_flight: 1,
            answered_in: vec![Duration::from_millis(5)],
            tables: Tables { requests: 3, results: 6, ..Tables::default() },
            faults: vec![Overcome { kind: Kind::ApiKilled, what: String::new(), recovered_in: Duration::from_secs(1) }],
            ..Report::default()
        }
    }

    #[test]
    fn whatever_breaks_a_guarantee_is_a_failure() {
        assert_eq!(good().failures(), [""; 0]);
        assert!(good().to_string().contains("nothing lost"));
        let tables = good().tables;
        for bad in [
            Report { accepted: 0, signed: 0, failed: 0, tables: Tables { requests: 0, ..tables }, ..good() },
            Report { faults: Vec::new(), ..good() },
            Report { signed: 1, ..good() },
            Report { tables: Tables { requests: 4, ..tables }, ..good() },
            Report { wrong_signatures: 1, ..good() },
            Report { delivered: 1, ..good() },
            Report { unverified: 1, ..good() },
            Report { max_in_window: 11, ..good() },
            Report { max_in_window: 9, ..good() },
            Report { over_budget: 1, ..good() },
            Report { max_in_flight: 2, ..good() },
            Report { late: vec!["POST #1".to_owned()], ..good() },
            Report { unanswered: vec!["reset".to_owned()], ..good() },
            Report { tables: Tables { results: 0, ..tables }, ..good() },
            Report { tables: Tables { unfenced: 1, ..tables }, ..good() },
            Report { tables: Tables { succeeded_without_a_successful_attempt: 1, ..tables }, ..good() },
        ] {
            assert_eq!(bad.failures().len(), 1, "{:?}", bad.failures());
            assert!(bad.to_string().contains("failed: "));
        }
    }
}
