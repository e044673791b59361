//! Tests of the private Postgres server: it answers, survives a crash, and never outlives its owner.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use devkit::postgres::{Cluster, ClusterOptions, Detached, Durability, StopMode, shared_cluster};
use devkit::wait::until;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use sqlx::Connection;
use tokio::io::{AsyncBufReadExt, BufReader};

fn alive(pid: i32) -> bool {
    kill(Pid::from_raw(pid), None).is_ok()
}

async fn one(cluster: &Cluster) -> i32 {
    let mut connection = cluster.connect("postgres").await.unwrap();
    sqlx::query_scalar("select 1").fetch_one(&mut connection).await.unwrap()
}

#[tokio::test]
async fn the_shared_cluster_answers_and_is_one() {
    let cluster = shared_cluster().await.unwrap();
    assert_eq!(one(cluster).await, 1);
    assert_eq!(shared_cluster().await.unwrap().port(), cluster.port());
}

#[tokio::test]
async fn two_clusters_run_at_once_and_leave_nothing_behind() {
    let (first, second) = tokio::join!(Cluster::start(ClusterOptions::default()), Cluster::start(ClusterOptions::default()));
    let (first, second) = (first.unwrap(), second.unwrap());
    assert_ne!(first.port(), second.port());
    assert_eq!((one(&first).await, one(&second).await), (1, 1));
    let left: Vec<(i32, PathBuf)> = [&first, &second].map(|cluster| (cluster.pid().unwrap(), cluster.folder())).into();
    drop((first, second));
    for (pid, folder) in left {
        assert!(!alive(pid) && !folder.exists(), "{}", folder.display());
    }
}

#[tokio::test]
async fn a_crash_of_the_server_keeps_what_was_committed_and_the_port() {
    let cluster = Cluster::start(ClusterOptions::default()).await.unwrap();
    let mut connection = cluster.connect("postgres").await.unwrap();
    sqlx::raw_sql("create table kept (n int); insert into kept values (42)").execute(&mut connection).await.unwrap();
    let port = cluster.port();

    cluster.stop(StopMode::Immediate).await.unwrap();
    assert!(sqlx::query("select 1").execute(&mut connection).await.is_err());
    assert!(cluster.connect("postgres").await.is_err());
    assert_eq!(cluster.pid(), None);

    cluster.start_again().await.unwrap();
    assert_eq!(cluster.port(), port);
    let mut connection = cluster.connect("postgres").await.unwrap();
    assert_eq!(sqlx::query_scalar::<_, i32>("select n from kept").fetch_one(&mut connection).await.unwrap(), 42);
    connection.close().await.unwrap();
    assert!(cluster.folder().exists(), "the guardian of the first run must leave the files to the second");
}

#[tokio::test]
async fn a_killed_owner_leaves_neither_server_nor_files() {
    let mut owner = tokio::process::Command::new(env!("CARGO_BIN_EXE_devkit"))
        .arg("postgres")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let line = BufReader::new(owner.stdout.take().unwrap()).lines().next_line().await.unwrap().expect("an address");
    let told: serde_json::Value = serde_json::from_str(&line).unwrap();
    let pid = i32::try_from(told["pid"].as_i64().unwrap()).unwrap();
    let folder = PathBuf::from(told["folder"].as_str().unwrap());
    sqlx::PgConnection::connect(told["url"].as_str().unwrap()).await.unwrap().close().await.unwrap();
    assert!(alive(pid) && folder.exists());

    owner.kill().await.unwrap();
    until("the server is gone", async || !alive(pid)).await;
    until("the files are gone", async || !folder.exists()).await;
}

#[tokio::test]
async fn databases_are_made_copied_and_removed() {
    let cluster = shared_cluster().await.unwrap();
    let (template, copy) = ("made \"here\"", "copied");
    cluster.create_database(template).await.unwrap();
    let mut connection = cluster.connect("made%20%22here%22").await.unwrap();
    sqlx::raw_sql("create table marker ()").execute(&mut connection).await.unwrap();

    assert_eq!(cluster.terminate_connections(template).await.unwrap(), 1);
    assert!(sqlx::query("select 1").execute(&mut connection).await.is_err());
    cluster.create_database_from(copy, template).await.unwrap();
    let mut connection = cluster.connect(copy).await.unwrap();
    sqlx::query("select from marker").execute(&mut connection).await.unwrap();

    // It is dropped whether or not it has connections.
    cluster.drop_database(copy).await.unwrap();
    cluster.drop_database(copy).await.unwrap();
    assert!(cluster.connect(copy).await.is_err());
    cluster.connect("made%20%22here%22").await.unwrap();
}

#[tokio::test]
async fn tests_do_not_wait_for_the_disk_and_the_stack_does() {
    async fn setting(cluster: &Cluster, name: &str) -> String {
        let mut connection = cluster.connect("postgres").await.unwrap();
        sqlx::query_scalar("select current_setting($1)").bind(name).fetch_one(&mut connection).await.unwrap()
    }
    let relaxed = shared_cluster().await.unwrap();
    assert_eq!((setting(relaxed, "fsync").await, setting(relaxed, "synchronous_commit").await), ("off".into(), "on".into()));
    let options =
        ClusterOptions { durability: Durability::Full, settings: vec![("work_mem".into(), "5MB".into())], ..ClusterOptions::default() };
    let full = Cluster::start(options).await.unwrap();
    assert_eq!((setting(&full, "fsync").await, setting(&full, "full_page_writes").await), ("on".into(), "on".into()));
    assert_eq!(setting(&full, "work_mem").await, "5MB");
}

#[tokio::test]
async fn a_persistent_cluster_keeps_its_data_and_a_taken_port_is_named() {
    let parent = tempfile::tempdir().unwrap();
    open_to_all(parent.path());
    let options = ClusterOptions { folder: Some(parent.path().join("kept")), ..ClusterOptions::default() };
    let cluster = Cluster::start(options.clone()).await.unwrap();
    cluster.create_database("mine").await.unwrap();
    let taken = ClusterOptions { port: Some(cluster.port()), ..ClusterOptions::default() };
    let error = Cluster::start(taken).await.unwrap_err();
    assert_eq!(error.to_string(), format!("port {} of 127.0.0.1 is taken", cluster.port()));

    drop(cluster);
    let cluster = Cluster::start(options).await.unwrap();
    cluster.connect("mine").await.unwrap();
}

#[tokio::test]
async fn data_that_an_unprivileged_account_could_not_reach_goes_elsewhere_and_it_is_said() {
    // Only root needs another account.
    let closed = tempfile::tempdir().unwrap();
    std::fs::set_permissions(closed.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let requested = closed.path().join("below");
    let options = ClusterOptions { folder: Some(requested.clone()), ..ClusterOptions::default() };
    let cluster = Cluster::start(options).await.unwrap();
    assert_eq!(one(&cluster).await, 1);
    let folder = cluster.folder();
    let moved = nix::unistd::geteuid().is_root();
    assert_eq!(folder != requested, moved);
    assert_eq!(cluster.note().is_some_and(|note| note.contains(folder.to_str().unwrap())), moved);
    drop(cluster);
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn a_detached_server_is_found_again_and_stopped_by_its_folder() {
    let parent = tempfile::tempdir().unwrap();
    open_to_all(parent.path());
    let folder = parent.path().join("stack");
    assert!(Detached::at(&folder).unwrap().is_none());

    let port = devkit::ports::free_port().unwrap();
    let options = ClusterOptions { folder: Some(folder.clone()), port: Some(port), ..ClusterOptions::default() };
    let first = Detached::start(&options).unwrap();
    let mut connection = sqlx::PgConnection::connect(&first.url("postgres").unwrap()).await.unwrap();
    drop(first);
    sqlx::query("select 1").execute(&mut connection).await.unwrap();
    drop(connection);

    let found = Detached::at(&folder).unwrap().unwrap();
    assert_eq!(found.running(), Some(port));
    found.stop().unwrap();
    found.stop().unwrap();
    assert_eq!(found.running(), None);
    found.remove().unwrap();
    assert!(Detached::at(&folder).unwrap().is_none());
}

/// Lets an unprivileged account pass through the folder, as it can through that of a repository.
fn open_to_all(folder: &Path) {
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
}
