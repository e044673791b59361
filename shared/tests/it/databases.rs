//! Databases and roles that somebody else set up.

use shared::store::StoreError;
use sqlx::Connection;
use uuid::Uuid;

use crate::fixture::{Fixture, connect};

#[tokio::test]
async fn a_database_that_is_not_in_utf8_is_refused_and_nothing_is_created_in_it() {
    let f = Fixture::new().await;
    for encoding in ["LATIN1", "SQL_ASCII"] {
        let name = format!("t{}", Uuid::now_v7().simple());
        f.run(&format!("create database {name} template template0 encoding '{encoding}' lc_collate 'C' lc_ctype 'C'")).await;
        let (server, _) = f.url.rsplit_once('/').unwrap();
        let other = Fixture::new().await.over(format!("{server}/{name}"));
        for migrate in [true, false] {
            let error = other.store.prepare(migrate).await.unwrap_err();
            assert!(error.is_a_wrong_setting() && error.to_string().contains(encoding), "{error}");
        }
        assert_eq!(other.number("select count(*) from pg_tables where schemaname = 'public'").await, 0);
    }
}

#[tokio::test]
async fn a_role_that_may_not_create_tables_is_told_so_and_serves_once_another_one_has_migrated() {
    let f = Fixture::new().await;
    let role = format!("r{}", Uuid::now_v7().simple());
    f.run(&format!("create role {role} login; revoke create on schema public from public")).await;
    let url = f.url.replace("postgres://postgres@", &format!("postgres://{role}@"));
    for migrate in [true, false] {
        let error = connect(&url).prepare(migrate).await.unwrap_err();
        assert!(matches!(error, StoreError::NotAllowed(_)) && error.is_a_wrong_setting(), "{error:?}");
    }
    f.run(&format!(
        "grant select, insert, update, delete on all tables in schema public to {role};
        grant usage on all sequences in schema public to {role}"
    ))
    .await;
    let restricted = f.over(url);
    restricted.store.prepare(false).await.unwrap();
    let id = restricted.signed("m").await;
    assert!(restricted.state(id).await.signature.is_some());
}

#[tokio::test]
async fn what_waits_for_a_row_sees_what_became_of_it_also_where_transactions_are_serializable_by_default() {
    let f = Fixture::new().await;
    f.post("m").await;
    f.run("do $$ begin execute format('alter database %I set default_transaction_isolation = serializable', current_database()); end $$")
        .await;
    let f = f.with_new_sessions().await;
    let mut connection = f.connection().await;
    let mut other = connection.begin().await.unwrap();
    sqlx::raw_sql("update jobs set attached = attached + 1").execute(&mut *other).await.unwrap();
    let group = [f.request("m")];
    let (accepted, ()) = tokio::join!(f.store.accept(&group, u64::MAX), async {
        f.until_somebody_waits_for_a_lock().await;
        other.commit().await.unwrap();
    });
    accepted.unwrap().remove(0).unwrap();
    assert_eq!(f.number("select attached::bigint from jobs").await, 3);
}
