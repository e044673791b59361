//! `.sqlx`, the data that queries are checked against when there is no database.
//!
//! The macros describe every query again, and `SQLX_OFFLINE_DIR` tells them where to write. They run only when their crate is compiled. So
//! the crate is checked in a variant that no build has made yet, next to the ordinary builds; its dependencies are reused as they are.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Error, Result, anyhow};

use crate::workspace::{self, Profile};

/// The only crate with queries.
const PACKAGE: &str = "shared";

/// The query files, by name.
pub(super) type Queries = BTreeMap<String, Vec<u8>>;

/// Compiles the queries against the database, and returns the files that sqlx wrote.
pub(super) fn describe(root: &Path, url: &str) -> Result<Queries> {
    let output = tempfile::tempdir().context("making a temporary folder")?;
    let profile = Profile::of_this_process()?;
    // `cargo check` generates no code, so the number of codegen units changes only the name under which Cargo caches the result.
    let variant = format!("profile.dev.package.{PACKAGE}.codegen-units={}", rand::random_range(1_000..1_000_000));
    say!("describing the queries of `{PACKAGE}`");
    let check = workspace::cargo()
        .args(["check", "--quiet", "--package", PACKAGE, "--all-targets", "--config", &variant])
        .args(["--message-format", "json-render-diagnostics", "--target-dir"])
        .arg(profile.target(root))
        .current_dir(root)
        .envs([("DATABASE_URL", url), ("SQLX_OFFLINE", "false"), ("CARGO_INCREMENTAL", "0")])
        .env("SQLX_OFFLINE_DIR", output.path())
        .stdin(Stdio::null())
        .output()
        .context("running cargo")?;
    remove_artifacts(&String::from_utf8_lossy(&check.stdout));
    if !check.status.success() {
        return Err(Error::msg(first_error(&String::from_utf8_lossy(&check.stderr))));
    }
    let made = read(output.path())?;
    // If there are no files, the macros did not run.
    if made.is_empty() { Err(anyhow!("sqlx wrote nothing: was `{PACKAGE}` compiled?")) } else { Ok(made) }
}

/// Removes the artifacts of the variant that Cargo reports: no other build uses them.
fn remove_artifacts(messages: &str) {
    for message in messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()) {
        let ours = message["manifest_path"].as_str().is_some_and(|path| Path::new(path).ends_with(Path::new(PACKAGE).join("Cargo.toml")));
        let files = message["filenames"].as_array().into_iter().flatten().filter_map(serde_json::Value::as_str);
        for file in files.filter(|_| ours && message["fresh"] == false) {
            // It does not matter if the file is already gone.
            let _ = std::fs::remove_file(file);
        }
    }
}

/// The compiler's first error and its location.
fn first_error(text: &str) -> String {
    let mut lines = text.lines().skip_while(|line| !line.starts_with("error"));
    let error = lines.next().unwrap_or("cargo failed and said nothing").trim();
    let place = lines.next().map(str::trim).filter(|line| line.starts_with("-->"));
    format!("`{PACKAGE}` does not compile: {error} {}", place.unwrap_or_default())
}

/// All query files of a folder; empty if the folder does not exist.
pub(super) fn read(folder: &Path) -> Result<Queries> {
    if !folder.is_dir() {
        return Ok(Queries::new());
    }
    let entries = std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    let queries = paths.iter().filter_map(|path| {
        let name = path.file_name()?.to_str()?;
        let is_query = name.starts_with("query-") && path.extension().is_some_and(|extension| extension == "json");
        is_query.then(|| Ok((name.to_owned(), std::fs::read(path).with_context(|| format!("reading {}", path.display()))?)))
    });
    queries.collect()
}

/// One sentence for each file that is missing, stale or different.
pub(super) fn differences(committed: &Queries, made: &Queries) -> Vec<String> {
    let name = |bytes: &[u8]| {
        let query: serde_json::Value = serde_json::from_slice(bytes).unwrap_or_default();
        query["query"].as_str().and_then(|sql| sql.lines().next()).unwrap_or("a query").trim().to_owned()
    };
    let new = made.iter().filter_map(|(file, bytes)| match committed.get(file) {
        None => Some(format!(".sqlx lacks `{}`", name(bytes))),
        Some(old) if old != bytes => Some(format!(".sqlx describes `{}` otherwise than Postgres does", name(bytes))),
        Some(_) => None,
    });
    let stale = committed.iter().filter(|(file, _)| !made.contains_key(*file));
    new.chain(stale.map(|(_, bytes)| format!(".sqlx holds `{}`, which is not in the code", name(bytes)))).collect()
}

/// Makes the files of `folder` those that were made.
pub(super) fn write(folder: &Path, committed: &Queries, made: &Queries) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    for (file, bytes) in made {
        std::fs::write(folder.join(file), bytes).with_context(|| format!("writing {file}"))?;
    }
    for stale in committed.keys().filter(|file| !made.contains_key(*file)) {
        std::fs::remove_file(folder.join(stale)).with_context(|| format!("removing {stale}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queries(items: &[(&str, &str)]) -> Queries {
        items.iter().map(|(file, sql)| ((*file).to_owned(), format!(r#"{{"query":"{sql}"}}"#).into_bytes())).collect()
    }

    #[test]
    fn every_difference_names_its_query() {
        let committed = queries(&[("query-a.json", "-- a"), ("query-b.json", "-- b"), ("query-c.json", "-- c")]);
        let made = queries(&[("query-a.json", "-- a"), ("query-b.json", "-- b2"), ("query-d.json", "-- d\\nselect")]);
        let found = differences(&committed, &made);
        assert_eq!(found.len(), 3);
        assert!(found[0].contains("`-- b2` otherwise") && found[1].contains("lacks `-- d`") && found[2].contains("holds `-- c`"));
    }

    #[test]
    fn writing_removes_what_is_stale_and_leaves_other_files() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("notes.md"), "kept").unwrap();
        let (old, new) = (queries(&[("query-a.json", "a")]), queries(&[("query-b.json", "b")]));
        write(folder.path(), &Queries::new(), &old).unwrap();
        write(folder.path(), &old, &new).unwrap();
        assert_eq!(read(folder.path()).unwrap(), new);
        assert!(folder.path().join("notes.md").exists());
    }

    #[test]
    fn a_failed_compilation_is_one_line() {
        let text = "warning: x\nerror[E0308]: mismatched types\n  --> shared/src/store/a.rs:1:2\n   |\n";
        assert_eq!(first_error(text), "`shared` does not compile: error[E0308]: mismatched types --> shared/src/store/a.rs:1:2");
    }
}
