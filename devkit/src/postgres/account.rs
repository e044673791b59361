//! The account that runs the server, and where its files can be.
//!
//! Postgres refuses to run as root, and developers in containers are root. In that case, the server runs as an unprivileged account, which
//! must be able to reach the data folder. A folder below a home that is closed to others (`/root`) cannot be used.

use std::fs::Permissions;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow};
use nix::unistd::{User, geteuid};

use crate::hex::hex;

/// The account that the server's processes run as, if it is not the account of this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Account {
    uid: u32,
    gid: u32,
}

/// The location of a cluster's files.
#[derive(Debug)]
pub(super) struct Place {
    /// The folder, which exists and belongs to the account.
    pub(super) folder: PathBuf,
    /// A note for the developer; `None` if the folder is the requested one.
    pub(super) note: Option<String>,
}

impl Account {
    /// The account to run the server as: `None` if this process can run it itself, else `postgres`, else `nobody`.
    pub(super) fn needed() -> Result<Option<Self>> {
        if !geteuid().is_root() {
            return Ok(None);
        }
        for name in ["postgres", "nobody"] {
            if let Some(user) = User::from_name(name).with_context(|| format!("looking up the account {name}"))? {
                return Ok(Some(Self { uid: user.uid.as_raw(), gid: user.gid.as_raw() }));
            }
        }
        Err(anyhow!("Postgres refuses to run as root, and there is neither an account `postgres` nor `nobody` to run it as"))
    }

    /// Returns whether the account can pass through the folder.
    fn may_enter(&self, folder: &Path) -> bool {
        folder.metadata().is_ok_and(|meta| {
            let bit = if meta.uid() == self.uid {
                0o100
            } else if meta.gid() == self.gid {
                0o010
            } else {
                0o001
            };
            meta.is_dir() && meta.mode() & bit != 0
        })
    }
}

/// A command that runs as the account, without any Postgres setting of the caller's environment.
pub(super) fn command(program: &Path, account: Option<&Account>, folder: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("LC_ALL", "C").current_dir(folder);
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    if let Some(account) = account {
        command.uid(account.uid).gid(account.gid);
    }
    command
}

/// Changes the owner of a file or folder to the account.
pub(super) fn give(path: &Path, account: Option<&Account>) -> Result<()> {
    match account {
        Some(account) => std::os::unix::fs::chown(path, Some(account.uid), Some(account.gid))
            .with_context(|| format!("giving {} to the account that runs Postgres", path.display())),
        None => Ok(()),
    }
}

/// Creates a folder in the system's folder for temporary files. It is not removed automatically.
pub(super) fn temporary_folder(account: Option<&Account>) -> Result<PathBuf> {
    let folder = tempfile::Builder::new()
        .prefix("countersign-postgres-")
        .permissions(Permissions::from_mode(0o700))
        .tempdir()
        .context("making a temporary folder")?;
    give(folder.path(), account)?;
    Ok(folder.keep())
}

/// Creates the requested folder or, if the account cannot reach it, the one of [`chosen_folder`], with a note that says so.
pub(super) fn persistent_folder(requested: &Path, account: Option<&Account>) -> Result<Place> {
    let folder = chosen_folder(requested, account)?;
    own(&folder, account)?;
    let moved = std::path::absolute(requested).is_ok_and(|requested| requested != folder);
    let note = moved
        .then(|| format!("Postgres cannot use {} as an unprivileged account; its data is in {}", requested.display(), folder.display()));
    Ok(Place { folder, note })
}

/// The requested folder or, if the account cannot reach it, a stable one derived from it in the folder for temporary files.
pub(super) fn chosen_folder(requested: &Path, account: Option<&Account>) -> Result<PathBuf> {
    let requested = std::path::absolute(requested).with_context(|| format!("the folder {}", requested.display()))?;
    let mut existing = requested.ancestors().skip(1).filter(|folder| folder.exists());
    if account.is_none_or(|account| existing.all(|folder| account.may_enter(folder))) {
        return Ok(requested);
    }
    let digest = ring::digest::digest(&ring::digest::SHA256, requested.as_os_str().as_encoded_bytes());
    let name = hex(&digest.as_ref()[..8]);
    Ok(std::env::temp_dir().join(format!("countersign-{name}")))
}

/// Creates the folder, closed to others, unless it exists and is ours. The folder of another user is refused: in a place that everyone can
/// write to, it could be a trap.
fn own(folder: &Path, account: Option<&Account>) -> Result<()> {
    let owner = |path: &Path| path.symlink_metadata().map(|meta| (meta.is_dir(), meta.uid()));
    if let Ok((is_folder, uid)) = owner(folder) {
        let ours = uid == geteuid().as_raw() || account.is_some_and(|account| account.uid == uid);
        if !is_folder || !ours {
            return Err(anyhow!("{} is not a folder of this account", folder.display()));
        }
    } else {
        if let Some(parent) = folder.parent() {
            std::fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
        }
        std::fs::DirBuilder::new().mode(0o700).create(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    give(folder, account)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_the_account_cannot_reach_is_replaced_by_a_stable_one() {
        let closed = tempfile::tempdir().unwrap();
        let stranger = Account { uid: u32::MAX - 7, gid: u32::MAX - 7 };
        let requested = closed.path().join("not/there/yet");
        let choose = || chosen_folder(&requested, Some(&stranger)).unwrap();

        std::fs::set_permissions(closed.path(), Permissions::from_mode(0o700)).unwrap();
        assert_ne!(choose(), requested);
        assert_eq!(choose(), choose());
        assert_eq!(chosen_folder(&requested, None).unwrap(), requested);

        std::fs::set_permissions(closed.path(), Permissions::from_mode(0o711)).unwrap();
        assert_eq!(choose(), requested);
    }

    #[test]
    fn a_file_in_the_place_of_the_folder_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let file = parent.path().join("data");
        std::fs::write(&file, "").unwrap();
        assert!(persistent_folder(&file, None).unwrap_err().to_string().contains("is not a folder"));
    }
}
