//! Finds the programs of the Postgres server.
//!
//! Distributions keep `initdb` and `postgres` out of `PATH`, each in its own place, often in several versions. Devkit needs no setting on a
//! machine where Postgres 14 to 18 is installed in one of the usual ways.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Error, Result, anyhow};

const NOT_FOUND: &str = "no PostgreSQL server binaries found; run `make postgres`, or install the package `postgresql`, \
     or set PG_BIN to the folder that holds initdb";
const NEEDED: [&str; 3] = ["initdb", "pg_ctl", "postgres"];
const SUPPORTED: std::ops::RangeInclusive<u32> = 14..=18;

/// A folder with the server's programs, all of one version.
#[derive(Clone, Debug)]
pub struct Binaries {
    folder: PathBuf,
}

impl Binaries {
    /// Looks in `PG_BIN` if it is set; otherwise in `PATH`, then where distributions put the programs, the newest version first.
    ///
    /// # Errors
    /// If there is none (the error names the remedy), or if `PG_BIN` is set to something else than such a folder.
    pub fn find() -> Result<Self> {
        if let Some(folder) = std::env::var_os("PG_BIN").filter(|value| !value.is_empty()) {
            return Self::in_folder(Path::new(&folder)).context("PG_BIN");
        }
        candidates(std::env::var_os("PATH").as_deref(), Path::new("/"))
            .iter()
            .find_map(|folder| Self::in_folder(folder).ok())
            .ok_or_else(|| Error::msg(NOT_FOUND))
    }

    /// The programs in this folder.
    ///
    /// # Errors
    /// If a program is missing, or the version is not supported.
    pub fn in_folder(folder: &Path) -> Result<Self> {
        if let Some(missing) = NEEDED.iter().find(|name| !folder.join(name).is_file()) {
            return Err(anyhow!("{} holds no {missing}", folder.display()));
        }
        let program = folder.join("postgres");
        let output = Command::new(&program).arg("--version").output().with_context(|| format!("running {}", program.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        match major_version(&text) {
            Some(major) if SUPPORTED.contains(&major) => Ok(Self { folder: folder.to_owned() }),
            _ => Err(anyhow!("{} is `{}`; needed: PostgreSQL 14 to 18", program.display(), text.trim())),
        }
    }

    /// The path of one program.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

/// Parses the major version: `postgres (PostgreSQL) 17.2 (Debian 17.2-1)` is 17, `18beta1` is 18.
fn major_version(text: &str) -> Option<u32> {
    let version = text.split_once("(PostgreSQL)")?.1.trim_start();
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// The folders that may hold the programs, best first. `root` is `/` outside of tests.
fn candidates(path: Option<&OsStr>, root: &Path) -> Vec<PathBuf> {
    let on_path = path.into_iter().flat_map(std::env::split_paths).filter_map(|folder| {
        // A link in a common folder points to the real folder, which has the other programs, too.
        let program = folder.join("postgres").canonicalize().ok()?;
        program.parent().map(Path::to_owned)
    });
    let mut found: Vec<PathBuf> = on_path.collect();
    found.extend(versions(&root.join("usr/lib/postgresql"), "", "bin"));
    found.extend(versions(&root.join("usr"), "pgsql-", "bin"));
    found.extend(versions(&root.join("opt/homebrew/opt"), "postgresql@", "bin"));
    found.extend(versions(&root.join("usr/local/opt"), "postgresql@", "bin"));
    found.extend(versions(&root.join("Applications/Postgres.app/Contents/Versions"), "", "bin"));
    found
}

/// `{parent}/{prefix}{number}/{below}`, the highest number first.
fn versions(parent: &Path, prefix: &str, below: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    let mut found: Vec<(u32, PathBuf)> = entries
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()?;
            Some((number, entry.path().join(below)))
        })
        .collect();
    found.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
    found.into_iter().map(|(_, folder)| folder).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_version_is_looked_at_first_and_path_before_it() {
        let root = tempfile::tempdir().unwrap();
        for version in ["9", "15", "16", "common"] {
            std::fs::create_dir_all(root.path().join("usr/lib/postgresql").join(version).join("bin")).unwrap();
        }
        let real = root.path().join("somewhere/bin");
        let linked = root.path().join("links");
        std::fs::create_dir_all(&real).unwrap();
        std::fs::create_dir_all(&linked).unwrap();
        std::fs::write(real.join("postgres"), "").unwrap();
        std::os::unix::fs::symlink(real.join("postgres"), linked.join("postgres")).unwrap();

        let found = candidates(Some(linked.as_os_str()), root.path());
        let ends = ["somewhere/bin", "postgresql/16/bin", "postgresql/15/bin", "postgresql/9/bin"];
        assert_eq!(found.len(), ends.len(), "{found:?}");
        assert!(found.iter().zip(ends).all(|(path, end)| path.ends_with(end)), "{found:?}");
    }

    #[test]
    fn the_major_version_is_read_from_what_postgres_prints() {
        assert_eq!(major_version("postgres (PostgreSQL) 17.2 (Debian 17.2-1.pgdg)\n"), Some(17));
        assert_eq!(major_version("postgres (PostgreSQL) 18beta1"), Some(18));
        assert_eq!(major_version("not it"), None);
    }

    #[test]
    fn a_folder_without_the_programs_is_refused_by_name() {
        let empty = tempfile::tempdir().unwrap();
        assert!(Binaries::in_folder(empty.path()).unwrap_err().to_string().contains("holds no initdb"));
    }
}
