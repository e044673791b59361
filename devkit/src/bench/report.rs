//! The rows, their verdicts, and their three output formats: a table, JSON, and the table of the document.

use std::fmt::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result, anyhow};
use comfy_table::ContentArrangement;
use serde::Serialize;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::machine::Machine;
use super::plan::Plan;
use super::stats::Runs;
use super::workloads::Workload;
use crate::error::line;
use crate::report::new_table;

/// One comparison of our figures with a peer or a bound.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub(super) workload: Workload,
    /// What was measured, in enough detail to understand it.
    pub(super) what: String,
    /// The unit of the figures, such as `requests/s`.
    pub(super) unit: &'static str,
    pub(super) target: Target,
    pub(super) ours: Runs,
    pub(super) peer: Option<Peer>,
    /// More figures, for the JSON only.
    pub(super) detail: Value,
}

/// The peer that a row compares with.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Peer {
    pub(super) name: String,
    /// The settings with which it was the fastest.
    pub(super) settings: String,
    pub(super) figures: Figures,
}

/// The figures of a peer.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Figures {
    Measured(Runs),
    /// The reason why it was not run.
    NotRun(String),
}

/// The condition for a row to pass.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Target {
    /// Ours is at least this many times the peer's.
    Times(f64),
    /// Ours is at most this.
    AtMost(f64),
    /// Ours is below this.
    Below(f64),
    /// No condition: the row only says what something costs.
    Told,
}

/// The verdict on a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Verdict {
    Pass,
    Short,
    NotRun,
    Told,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Short => "FALLS SHORT",
            Self::NotRun => "not run",
            Self::Told => "",
        }
    }
}

impl Row {
    /// A row without a peer.
    pub(super) fn bound(workload: Workload, what: impl Into<String>, unit: &'static str, target: Target, ours: Runs) -> Self {
        Self { workload, what: what.into(), unit, target, ours, peer: None, detail: Value::Null }
    }

    /// Adds a peer to the row.
    pub(super) fn beside(self, name: impl Into<String>, settings: impl Into<String>, figures: Figures) -> Self {
        Self { peer: Some(Peer { name: name.into(), settings: settings.into(), figures }), ..self }
    }

    /// Adds more figures to the row.
    pub(super) fn with(self, detail: Value) -> Self {
        Self { detail, ..self }
    }

    fn theirs(&self) -> Option<&Runs> {
        match self.peer.as_ref().map(|peer| &peer.figures) {
            Some(Figures::Measured(runs)) => Some(runs),
            _ => None,
        }
    }

    /// Our median divided by the peer's; `None` if the peer was not measured.
    pub(super) fn ratio(&self) -> Option<f64> {
        self.theirs().map(|theirs| self.ours.median() / theirs.median())
    }

    /// The verdict on this row.
    pub(super) fn verdict(&self) -> Verdict {
        let judge = |passes| if passes { Verdict::Pass } else { Verdict::Short };
        match (self.target, self.ratio()) {
            (Target::Told, _) if self.peer.is_some() && self.ratio().is_none() => Verdict::NotRun,
            (Target::Told, _) => Verdict::Told,
            (Target::AtMost(most), _) => judge(self.ours.median() <= most),
            (Target::Below(bound), _) => judge(self.ours.median() < bound),
            (Target::Times(least), Some(ratio)) => judge(ratio >= least),
            (Target::Times(_), None) => Verdict::NotRun,
        }
    }

    fn target_text(&self) -> String {
        match self.target {
            Target::Times(least) => format!("≥ {least} ×"),
            Target::AtMost(most) => format!("≤ {} {}", figure(most), self.unit),
            Target::Below(bound) => format!("< {} {}", figure(bound), self.unit),
            Target::Told => String::new(),
        }
    }

    /// The cells of the table: work, target, ours, the peer, its figure, ratio, verdict.
    fn cells(&self) -> [String; 7] {
        let peer = self.peer.as_ref();
        let name = peer.map(|peer| if peer.settings.is_empty() { peer.name.clone() } else { format!("{} ({})", peer.name, peer.settings) });
        let theirs = match peer.map(|peer| &peer.figures) {
            Some(Figures::Measured(runs)) => spread(runs),
            Some(Figures::NotRun(reason)) => format!("not run: {reason}"),
            None => String::new(),
        };
        [
            format!("{}: {}", self.workload.name(), self.what),
            self.target_text(),
            format!("{} {}", spread(&self.ours), self.unit),
            name.unwrap_or_default(),
            theirs,
            self.ratio().map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
            self.verdict().word().to_owned(),
        ]
    }
}

const HEADER: [&str; 7] = ["work", "target", "ours", "peer", "the peer's", "ratio", "verdict"];

/// The median, with the smallest and the largest figure if they differ.
fn spread(runs: &Runs) -> String {
    let [median, min, max] = [runs.median(), runs.min(), runs.max()].map(figure);
    if min == max { median } else { format!("{median} [{min} – {max}]") }
}

/// Formats a number for readers: no more digits than it deserves, and thousands separators.
fn figure(number: f64) -> String {
    let text = if number >= 100.0 {
        format!("{number:.0}")
    } else if number >= 10.0 {
        format!("{number:.1}")
    } else {
        format!("{number:.2}")
    };
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut grouped = String::new();
    for (place, digit) in whole.chars().enumerate() {
        if place > 0 && (whole.len() - place).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    // A bound of `5.00` is shown as `5`.
    let rest = if rest.chars().all(|digit| matches!(digit, '.' | '0')) { "" } else { rest };
    grouped + rest
}

/// The results of one invocation.
#[derive(Debug)]
pub(super) struct Report {
    machine: Machine,
    plan: Plan,
    started_at: OffsetDateTime,
    rows: Vec<Row>,
    failures: Vec<(Workload, String)>,
}

impl Report {
    /// An empty report.
    pub(super) fn new(machine: Machine, plan: &Plan) -> Self {
        Self { machine, plan: plan.clone(), started_at: OffsetDateTime::now_utc(), rows: Vec::new(), failures: Vec::new() }
    }

    /// Adds rows.
    pub(super) fn add(&mut self, rows: Vec<Row>) {
        self.rows.extend(rows);
    }

    /// Adds a workload that could not be measured.
    pub(super) fn fail(&mut self, workload: Workload, error: &Error) {
        eprintln!("{}: {}", workload.name(), line(error));
        self.failures.push((workload, line(error)));
    }

    /// Returns whether something could not be measured.
    pub(super) fn failed(&self) -> bool {
        !self.failures.is_empty()
    }

    /// A warning if the figures only show that the harness works.
    fn caveat(&self) -> Option<&'static str> {
        match (self.machine.is_release, self.plan.quick) {
            (false, _) => Some("DEBUG BUILD: a smoke test; the figures mean nothing"),
            (true, true) => Some("QUICK: a smoke test; the figures mean nothing"),
            _ => None,
        }
    }

    fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let mut value = serde_json::to_value(row).expect("rows have string keys only");
            value["ratio"] = json!(row.ratio());
            value["verdict"] = json!(row.verdict());
            value
        });
        json!({
            "startedAt": self.started_at.format(&Rfc3339).unwrap_or_default(),
            "caveat": self.caveat(),
            "machine": self.machine,
            "plan": self.plan,
            "rows": rows.collect::<Vec<_>>(),
            "failures": self.failures.iter().map(|(workload, error)| json!({"workload": workload, "error": error})).collect::<Vec<_>>(),
        })
    }

    /// Writes the results as JSON; those in the default place also under a name that is not overwritten later.
    pub(super) fn write(&self, root: &Path, path: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(&self.json()).expect("rows have string keys only");
        let write = |path: &Path| {
            let folder = path.parent().unwrap_or(root);
            std::fs::create_dir_all(folder)
                .and_then(|()| std::fs::write(path, &text))
                .with_context(|| format!("writing {}", path.display()))
        };
        write(path)?;
        match path.file_name() {
            Some(name) if name == "latest.json" => write(&path.with_file_name(format!("{}.json", self.started_at.unix_timestamp()))),
            _ => Ok(()),
        }
    }

    fn markdown(&self) -> String {
        let mut text = String::new();
        if let Some(caveat) = self.caveat() {
            let _ = writeln!(text, "**{caveat}.**\n");
        }
        let _ = writeln!(text, "{}\n", self.machine.to_string().trim_end().replace('\n', "  \n"));
        let line = |cells: [String; 7]| format!("| {} |", cells.map(|cell| cell.replace('|', "\\|")).join(" | "));
        let _ = writeln!(text, "{}\n{}", line(HEADER.map(str::to_owned)), line([const { String::new() }; 7].map(|_| "---".to_owned())));
        for row in &self.rows {
            let _ = writeln!(text, "{}", line(row.cells()));
        }
        for (workload, error) in &self.failures {
            let _ = writeln!(text, "\n{} could not be measured: {error}", workload.name());
        }
        text
    }

    /// Writes the table between the two marks of the document, and returns the document's path.
    pub(super) fn fill_document(&self, root: &Path) -> Result<PathBuf> {
        let path = root.join(DOCUMENT);
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let new = between_marks(&text, &self.markdown()).ok_or_else(|| anyhow!("{} has no `{BEGIN}`", path.display()))?;
        std::fs::write(&path, new).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }
}

const DOCUMENT: &str = "docs/performance.md";
const BEGIN: &str = "<!-- bench: begin -->\n";
const END: &str = "<!-- bench: end -->";

fn between_marks(text: &str, table: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{table}\n{END}{after}"))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(caveat) = self.caveat() {
            writeln!(f, "{caveat}")?;
        }
        let mut table = new_table();
        table.set_content_arrangement(ContentArrangement::Dynamic);
        table.set_header(HEADER);
        for row in &self.rows {
            table.add_row(row.cells());
        }
        write!(f, "{table}")?;
        self.failures.iter().try_for_each(|(workload, error)| write!(f, "\n{} could not be measured: {error}", workload.name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(target: Target, ours: f64) -> Row {
        Row::bound(Workload::Accept, "test", "requests/s", target, Runs::one(ours))
    }

    #[test]
    fn a_row_passes_falls_short_or_was_not_run() {
        let beside = |ours, theirs| row(Target::Times(1.5), ours).beside("p", "", Figures::Measured(Runs::one(theirs))).verdict();
        assert_eq!((beside(150.0, 100.0), beside(149.0, 100.0)), (Verdict::Pass, Verdict::Short));
        let not_run = row(Target::Times(1.5), 1.0).beside("p", "", Figures::NotRun("no node".into()));
        assert_eq!(not_run.verdict(), Verdict::NotRun);
        assert!(not_run.cells()[4].contains("no node"));
        assert_eq!((row(Target::AtMost(3.0), 3.0).verdict(), row(Target::Below(3.0), 3.0).verdict()), (Verdict::Pass, Verdict::Short));
        assert_eq!(row(Target::Told, 1.0).verdict(), Verdict::Told);
    }

    #[test]
    fn figures_have_no_more_digits_than_they_deserve() {
        assert_eq!([1_234_567.8, 99.94, 5.0, 0.123, 12_345.0].map(figure), ["1,234,568", "99.9", "5", "0.12", "12,345"]);
        assert_eq!(spread(&Runs::of(vec![1.0, 2.0, 3.0]).unwrap()), "2 [1 – 3]");
    }

    #[test]
    fn the_documents_table_is_replaced_and_nothing_else() {
        let text = format!("a\n{BEGIN}old\n{END}\nb\n");
        assert_eq!(between_marks(&text, "new").unwrap(), format!("a\n{BEGIN}\nnew\n{END}\nb\n"));
        assert_eq!(between_marks("a", "new"), None);
    }
}
