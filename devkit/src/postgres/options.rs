//! The options of a cluster, and the settings file made from them.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::account::{self, Account};

/// What a crash of the machine may lose. A crash of the server alone loses no committed data in either case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// Nothing is forced to disk: for tests, which start over anyway. `synchronous_commit` stays on, so that the order of events is the
    /// real one.
    #[default]
    Relaxed,
    /// As in production: for the local stack and for benchmarks.
    Full,
}

/// The options of a cluster. [`Default`] is a temporary cluster for tests.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// What a crash of the machine may lose.
    pub durability: Durability,
    /// The folder in which the data is kept; `None` for a temporary folder, which is removed with the cluster.
    pub folder: Option<PathBuf>,
    /// The port on 127.0.0.1; `None` for any free port.
    pub port: Option<u16>,
    /// The port on 127.0.0.1 of a running primary. Its data is copied, and the new server follows it as a standby until it is promoted.
    pub standby_of: Option<u16>,
    /// The number of connections that the server accepts.
    pub max_connections: u16,
    /// Further settings, by name; they override all others.
    pub settings: Vec<(String, String)>,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self { durability: Durability::Relaxed, folder: None, port: None, standby_of: None, max_connections: 200, settings: Vec::new() }
    }
}

impl ClusterOptions {
    /// The settings, as a file that `postgresql.conf` includes.
    fn file(&self, port: u16) -> String {
        let number = |value: u16| value.to_string();
        let mut settings = vec![
            ("listen_addresses", "127.0.0.1".to_owned()),
            ("unix_socket_directories", String::new()),
            ("port", number(port)),
            ("max_connections", number(self.max_connections)),
            ("timezone", "UTC".to_owned()),
            ("log_timezone", "UTC".to_owned()),
        ];
        if self.durability == Durability::Relaxed {
            settings.extend(["fsync", "full_page_writes"].map(|name| (name, "off".to_owned())));
        }
        settings.extend(self.settings.iter().map(|(name, value)| (name.as_str(), value.clone())));
        settings.iter().fold(String::new(), |mut file, (name, value)| {
            let _ = writeln!(file, "{name} = '{}'", value.replace('\\', "\\\\").replace('\'', "''"));
            file
        })
    }

    /// Writes the file next to `postgresql.conf`. Every start writes it anew.
    pub(super) fn write(&self, data: &Path, port: u16, account: Option<&Account>) -> Result<()> {
        let path = data.join(FILE);
        std::fs::write(&path, self.file(port)).with_context(|| format!("writing {}", path.display()))?;
        account::give(&path, account)
    }
}

/// Makes `postgresql.conf` include our file. Called once, after `initdb`.
pub(super) fn include(data: &Path) -> Result<()> {
    use std::io::Write as _;
    let path = data.join("postgresql.conf");
    std::fs::OpenOptions::new()
        .append(true)
        .open(&path)
        .and_then(|mut file| writeln!(file, "\ninclude_if_exists '{FILE}'"))
        .with_context(|| format!("writing {}", path.display()))
}

const FILE: &str = "countersign.conf";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_settings_come_last_and_are_quoted() {
        let options = ClusterOptions { settings: vec![("search_path".into(), "it's".into())], ..ClusterOptions::default() };
        let file = options.file(5433);
        assert!(file.contains("listen_addresses = '127.0.0.1'\n") && file.contains("unix_socket_directories = ''\n"), "{file}");
        assert!(file.contains("port = '5433'\n") && file.contains("fsync = 'off'\n") && !file.contains("synchronous_commit"), "{file}");
        assert!(file.ends_with("search_path = 'it''s'\n"), "{file}");
    }

    #[test]
    fn a_durable_cluster_keeps_every_safety_on() {
        let options = ClusterOptions { durability: Durability::Full, ..ClusterOptions::default() };
        assert!(!options.file(1).contains("off"));
    }
}
