//! The real `api` and `worker` as child processes, for tests that kill, stop and restart them.
//!
//! - [`build`] makes sure that the programs are built from the sources under test;
//! - [`Process`] is a running program with its log; it is killed when it is dropped.

mod log;
mod process;

pub use process::{Process, Signal};

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Error, Result, anyhow};

use crate::error::line;
use crate::workspace::{self, Profile};

/// Builds every program of the workspace, in the profile and target folder of this process. Blocks.
///
/// The build runs once per process. It is skipped if the programs are newer than their sources, as they are under `cargo test --workspace`,
/// which has just built them.
///
/// (Building again would be correct but slow: without the dependencies of the tests, Cargo selects fewer features and compiles half of the
/// dependency tree again.)
///
/// # Errors
/// If the build fails. Every later call returns the same error.
pub fn build() -> Result<()> {
    static BUILT: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    BUILT.get_or_init(|| run_build().map_err(|error| line(&error))).clone().map_err(Error::msg)
}

fn run_build() -> Result<()> {
    let profile = Profile::of_this_process()?;
    if PROGRAMS.iter().all(|name| is_current(&profile, name).unwrap_or(false)) {
        return Ok(());
    }
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--quiet", "--workspace", "--bins"]).args(profile.arguments()).current_dir(workspace::root()?);
    workspace::build(cargo, "the programs")
}

/// The programs that tests run.
const PROGRAMS: [&str; 2] = ["api", "worker"];

/// Returns whether the program is newer than everything that it is built from. Its package folder has the same name.
fn is_current(profile: &Profile, name: &str) -> Result<bool> {
    let changed = |path: &Path| path.metadata().and_then(|data| data.modified()).with_context(|| format!("looking at {}", path.display()));
    let built = changed(&profile.program(name))?;
    let root = workspace::root()?;
    let mut sources = vec![root.join("Cargo.lock"), root.join("Cargo.toml")];
    let mut folders = [name, "shared"].map(|folder| root.join(folder).join("src")).to_vec();
    folders.extend([root.join("migrations"), root.join(".sqlx")]);
    while let Some(folder) = folders.pop() {
        for entry in folder.read_dir().with_context(|| format!("reading {}", folder.display()))? {
            let path = entry.with_context(|| format!("reading {}", folder.display()))?.path();
            if path.is_dir() { folders.push(path) } else { sources.push(path) }
        }
    }
    for source in sources {
        if changed(&source)? > built {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The path of a program of the workspace, in the profile of this process. Call [`build`] first.
///
/// # Errors
/// If the program was not built.
pub fn program(name: &str) -> Result<PathBuf> {
    let path = Profile::of_this_process()?.program(name);
    if path.is_file() { Ok(path) } else { Err(anyhow!("{} was not built", path.display())) }
}
