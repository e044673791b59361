//! The paths of the repository and of Cargo's build output.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow};

/// The root of the workspace: the nearest ancestor folder with a `Cargo.lock` and a `devkit` folder.
///
/// The search starts at the package that Cargo runs this process for, or else at the current folder, and then at this executable.
pub(crate) fn root() -> Result<PathBuf> {
    let start = match std::env::var_os("CARGO_MANIFEST_DIR") {
        Some(package) => PathBuf::from(package),
        None => std::env::current_dir().context("the current folder")?,
    };
    root_above(&start)
        .or_else(|| root_above(&std::env::current_exe().ok()?))
        .ok_or_else(|| anyhow!("run this in the folder of the repository"))
}

fn root_above(start: &Path) -> Option<PathBuf> {
    start.ancestors().find(|folder| folder.join("Cargo.lock").is_file() && folder.join("devkit").is_dir()).map(Path::to_owned)
}

/// A command that runs Cargo: the one that runs this process, or the one in `PATH`.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // The variables that Cargo sets for this program's own package would make build scripts of dependencies run again.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") || text == "OUT_DIR" {
            cargo.env_remove(&name);
        }
    }
    cargo
}

/// Runs a build of `what`. Prints nothing if it succeeds. Blocks.
pub(crate) fn build(mut build: Command, what: &str) -> Result<()> {
    let output = build.stdin(Stdio::null()).output().with_context(|| format!("building {what}"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    let error = text.lines().find(|line| line.to_lowercase().starts_with("error") || line.starts_with("npm error"));
    Err(anyhow!("building {what} failed: {}", error.unwrap_or("it did not say why")))
}

/// A Cargo profile, identified by its output folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Profile {
    /// Such as `target/debug`.
    pub(crate) folder: PathBuf,
}

impl Profile {
    /// The profile of this process.
    pub(crate) fn of_this_process() -> Result<Self> {
        let executable = std::env::current_exe().context("the path of this program")?;
        Self::of(&executable).ok_or_else(|| anyhow!("{} is not in a folder that Cargo built", executable.display()))
    }

    /// The profile of an executable: a program is in the profile's folder, a test in `deps` below it.
    fn of(executable: &Path) -> Option<Self> {
        let folder = executable.parent()?;
        let folder = if folder.ends_with("deps") || folder.ends_with("examples") { folder.parent()? } else { folder };
        folder.parent()?;
        Some(Self { folder: folder.to_owned() })
    }

    /// Cargo's arguments for the same profile and target folder.
    pub(crate) fn arguments(&self) -> Vec<std::ffi::OsString> {
        let mut arguments = vec!["--target-dir".into(), self.target(Path::new("target")).into()];
        match self.folder.file_name().and_then(std::ffi::OsStr::to_str) {
            Some("debug") | None => {}
            Some(name) => arguments.extend(["--profile".into(), name.into()]),
        }
        arguments
    }

    /// The target folder above the profile's folder; `otherwise` if there is none.
    pub(crate) fn target<'a>(&'a self, otherwise: &'a Path) -> &'a Path {
        self.folder.parent().unwrap_or(otherwise)
    }

    /// The path of a program of the workspace.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_and_tests_know_their_profile() {
        for (executable, profile) in [("/r/target/debug/devkit", "debug"), ("/r/target/release/deps/it-0123", "release")] {
            let found = Profile::of(Path::new(executable)).unwrap();
            assert_eq!(found.folder, Path::new("/r/target").join(profile));
            assert_eq!(found.program("api"), Path::new("/r/target").join(profile).join("api"));
        }
        let release = Profile { folder: "/r/target/release".into() };
        assert_eq!(release.arguments(), ["--target-dir", "/r/target", "--profile", "release"]);
        assert_eq!(Profile { folder: "/r/target/debug".into() }.arguments(), ["--target-dir", "/r/target"]);
    }

    #[test]
    fn the_root_is_found_from_a_package_of_it() {
        assert!(root().unwrap().join("devkit").is_dir());
    }
}
