//! The load generator of Postgres: one row per transaction into a bare table, which is the least that a durable insert costs.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::process::Command;

use super::world::World;
use crate::postgres::Binaries;

const TABLE: &str = "create table bare (body text not null)";
/// About as long as the messages of the load generator.
const INSERT: &str = "insert into bare (body) values ('message 1234567');\n";

/// Inserts per second, with as many clients as our load generator has, over the fastest protocol of pgbench.
pub(super) async fn inserts(world: &World, clients: u16, time: Duration) -> Result<f64> {
    let program = Binaries::find()?.program("pgbench");
    if !program.is_file() {
        return Err(anyhow!("there is no {}", program.display()));
    }
    let database = world.bare("pgbench").await?;
    let mut connection = database.connect().await?;
    database.statement(&mut connection, TABLE).await?;
    let folder = tempfile::tempdir().context("making a temporary folder")?;
    let script = folder.path().join("insert.sql");
    std::fs::write(&script, INSERT).context("writing pgbench's script")?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(clients.into());
    let output = Command::new(&program)
        .args(["--no-vacuum", "--protocol", "prepared", "--client", &clients.to_string(), "--jobs", &threads.to_string()])
        .args(["--time", &time.as_secs().max(1).to_string(), "--file"])
        .arg(&script)
        .arg(&database.url)
        .output()
        .await
        .context("running pgbench")?;
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    rate(&text).ok_or_else(|| anyhow!("pgbench failed: {}", errors.lines().last().unwrap_or("it said nothing")))
}

/// Parses the rate from `tps = 1234.5 (without initial connection time)`.
fn rate(text: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_rate_is_read_from_what_pgbench_prints() {
        let text = "latency average = 1.9 ms\ninitial connection time = 30 ms\ntps = 1234.5 (without initial connection time)\n";
        assert_eq!(super::rate(text), Some(1234.5));
        assert_eq!(super::rate("error"), None);
    }
}
