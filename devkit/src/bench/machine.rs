//! The machine that everything ran on: without it, figures cannot be compared.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use super::stats::Times;
use super::world::World;

/// The machine, the versions and the settings.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Machine {
    cpu: String,
    cores: usize,
    memory_gib: f64,
    kernel: String,
    /// The load average of the last minute, before the first measurement.
    load: String,
    /// The type of the file system that holds the database.
    file_system: String,
    /// The time to force 8 kB to disk there, in milliseconds: the price of a commit.
    sync_ms: f64,
    postgres: String,
    /// Names and values, as the server reports them.
    postgres_settings: Vec<(String, String)>,
    commit: String,
    pub(super) is_release: bool,
}

/// Settings for crash safety, then those that affect the figures.
const SETTINGS: [&str; 8] = [
    "fsync",
    "synchronous_commit",
    "full_page_writes",
    "wal_sync_method",
    "shared_buffers",
    "max_wal_size",
    "checkpoint_timeout",
    "autovacuum",
];

impl Machine {
    /// Inspects the machine and the running Postgres.
    pub(super) async fn inspect(world: &World) -> Result<Self> {
        let mut connection = world.cluster.connect("postgres").await?;
        let mut postgres_settings = Vec::new();
        for name in SETTINGS {
            let value: String = sqlx::query_scalar("select current_setting($1)")
                .bind(name)
                .fetch_one(&mut connection)
                .await
                .with_context(|| format!("reading the setting {name}"))?;
            postgres_settings.push((name.to_owned(), value));
        }
        let postgres = sqlx::query_scalar("show server_version").fetch_one(&mut connection).await.context("reading the version")?;
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let folder = world.cluster.folder();
        Ok(Self {
            cpu: value_of(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_gib: kib(&read("/proc/meminfo"), "MemTotal").unwrap_or_default() / 1024.0 / 1024.0,
            kernel: format!("{} {}", std::env::consts::OS, read("/proc/sys/kernel/osrelease").trim()),
            load: read("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned(),
            file_system: file_system(&read("/proc/self/mounts"), &folder),
            sync_ms: sync_ms()?,
            postgres,
            postgres_settings,
            commit: commit(&world.root),
            is_release: !cfg!(debug_assertions),
        })
    }
}

/// The value of a line `name : value` in a file of the kernel.
fn value_of(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find(|line| line.split(':').next().is_some_and(|start| start.trim() == name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// A value in kB from a file of the kernel.
pub(super) fn kib(text: &str, name: &str) -> Option<f64> {
    value_of(text, name)?.split_whitespace().next()?.parse().ok()
}

/// The type of the file system that holds the folder: that of the longest mount point above it.
fn file_system(mounts: &str, folder: &Path) -> String {
    let mounts = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        Some((fields.next()?, fields.next()?))
    });
    let above = mounts.filter(|(place, _)| folder.starts_with(place));
    above.max_by_key(|(place, _)| place.len()).map_or_else(String::new, |(_, kind)| kind.to_owned())
}

/// The median time of a write that is forced to disk in the folder for temporary files, where the database is, too.
fn sync_ms() -> Result<f64> {
    let file: File = tempfile::tempfile().context("making a temporary file")?;
    let page = [0x5a; 8192];
    let write = |n: u64| {
        let started = Instant::now();
        file.write_all_at(&page, n * 8192).and_then(|()| file.sync_data()).context("writing to the disk")?;
        Ok(started.elapsed())
    };
    // The file is extended first: a log that is overwritten, as that of Postgres is, changes no metadata.
    (0..50).try_for_each(|n| write(n).map(|_: Duration| ()))?;
    Ok(Times::of((0..50).map(write).collect::<Result<Vec<_>>>()?).percentile(50.0))
}

fn commit(root: &Path) -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).current_dir(root).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|status| !status.is_empty());
    git(&["rev-parse", "--short", "HEAD"])
        .map_or_else(|| "unknown".to_owned(), |commit| if changed { format!("{commit} and changes") } else { commit })
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu, cores, memory_gib, kernel, load, file_system, sync_ms, .. } = self;
        writeln!(f, "{cpu}, {cores} cores, {memory_gib:.0} GiB, {kernel}; load before: {load}")?;
        write!(f, "PostgreSQL {} on {file_system}, where 8 kB are on the disk in {sync_ms:.2} ms: ", self.postgres)?;
        let settings = self.postgres_settings.iter().map(|(name, value)| format!("{name}={value}"));
        writeln!(f, "{}", settings.collect::<Vec<_>>().join(", "))?;
        write!(f, "commit {}, {} build", self.commit, if self.is_release { "release" } else { "debug" })?;
        if file_system == "tmpfs" {
            write!(f, "\nthe database is in memory: what a commit costs here, it costs nowhere; set TMPDIR to a folder on a disk")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_read() {
        let text = "processor\t: 0\nmodel name\t: A CPU @ 2: 1\n";
        assert_eq!(value_of(text, "model name").unwrap(), "A CPU @ 2: 1");
        assert_eq!(kib("MemTotal:       100 kB\nVmHWM: 7 kB\n", "VmHWM"), Some(7.0));
        assert_eq!(kib("", "VmHWM"), None);
        let mounts = "/dev/a / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n";
        assert_eq!(file_system(mounts, Path::new("/tmp/x")), "tmpfs");
        assert_eq!(file_system(mounts, Path::new("/tmpx")), "ext4");
    }
}
