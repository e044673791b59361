//! What the reports of several commands share: percentiles and tables.

use std::time::Duration;

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};

/// The nearest-rank percentile of durations in ascending order; zero if there are none.
pub(crate) fn percentile(ascending: &[Duration], per_cent: f64) -> Duration {
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "far below 2^52 of them")]
    let rank = (ascending.len() as f64 * per_cent / 100.0).ceil() as usize;
    ascending.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

/// An empty table in the style of all reports.
pub(crate) fn new_table() -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table
}

/// Aligns the columns from this one on to the right, because they have numbers.
pub(crate) fn right(table: &mut Table, from: usize) {
    for column in table.column_iter_mut().skip(from) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_one_of_the_times() {
        let times: Vec<Duration> = (1..=1000).map(Duration::from_millis).collect();
        assert_eq!([50.0, 99.0, 99.9, 100.0].map(|p| percentile(&times, p).as_millis()), [500, 990, 999, 1000]);
        assert_eq!(percentile(&times[..1], 50.0).as_millis(), 1);
        assert_eq!(percentile(&[], 95.0), Duration::ZERO);
    }
}
