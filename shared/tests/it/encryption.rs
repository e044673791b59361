//! Encryption at rest, as seen in the database.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Parser;
use shared::encryption::EncryptionError;
use shared::settings::DatabaseSettings;
use shared::standard_webhooks::WebhookSecret;
use shared::store::accept::{NewRequest, Rejection};
use shared::store::keys::{ApiKey, Bootstrapped, Changed, Scope};
use shared::store::webhook_claim::WebhookJob;
use shared::store::{Store, StoreError};

use crate::fixture::{Fixture, LEASE, any_receiver, id, webhook_to};

const A: &str = "a:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
const B: &str = "b:BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBE=";
const OTHER_A: &str = "a:CCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCE=";

#[derive(Parser)]
struct Settings {
    #[command(flatten)]
    database: DatabaseSettings,
}

/// The same database with these keys, opened as a process would do it: an error if a key is missing.
async fn with(f: &Fixture, keys: &[&str]) -> Result<Store, StoreError> {
    let settings = Settings::parse_from(["test", "--database-url", &f.url, "--encryption-key", &keys.join(",")]);
    let store = Store::connect_lazily(&settings.database)?;
    store.agree_on_encryption().await?;
    Ok(store)
}

fn error(started: Result<Store, StoreError>) -> EncryptionError {
    match started {
        Err(StoreError::Encryption(error)) => error,
        other => panic!("{other:?}"),
    }
}

fn request(f: &Fixture, token: &str, idempotency_key: Option<&str>) -> NewRequest {
    let headers: BTreeMap<String, String> = [("authorization".to_owned(), token.to_owned())].into();
    let webhook = webhook_to("http://example.com/", headers);
    NewRequest { webhook: Some(webhook), client_request_id: idempotency_key.map(ToOwned::to_owned), ..f.request("a") }
}

async fn claim(store: &Store) -> WebhookJob {
    store.claim_webhook_jobs(&any_receiver(1), None, LEASE).await.unwrap().0.jobs.remove(0)
}

/// Makes every webhook job and every probe due again.
async fn again(f: &Fixture) {
    f.run("update jobs set next_run_at = now(), lease_token = null where kind = 'webhook'; update receivers set probe_at = now()").await;
}

fn token(job: &WebhookJob) -> &str {
    &job.confidential.as_ref().unwrap().headers.expose()["authorization"]
}

#[tokio::test]
async fn headers_and_secrets_are_encrypted_and_what_was_stored_before_stays_readable_through_a_rotation() {
    let f = Fixture::new().await;
    f.signed("a").await;
    let plain = f.accept(request(&f, "stored-before", None)).await.id;
    let a = with(&f, &[A]).await.unwrap();
    let sealed = id(&a.accept(&[request(&f, "stored-with-a", None)], u64::MAX).await.unwrap()[0]);
    let secret = WebhookSecret::generate();
    a.create_key("new", &ApiKey::generate(), &[Scope::Sign], &secret, None).await.unwrap();
    assert_eq!(a.rotate_webhook_secret("test", &secret, Duration::from_hours(1)).await.unwrap(), Changed::Done);
    let dump =
        "select count(*) from requests r where r::text like '%stored-with-a%' or position('stored'::bytea in sealed_webhook_headers) > 0";
    assert_eq!(f.number(dump).await, 0);
    let encoded = secret.expose_text();
    let plain_secret = format!("select count(*) from api_keys where encode(webhook_secret, 'base64') = '{}'", &encoded["whsec_".len()..]);
    assert_eq!(f.number(&plain_secret).await, 0);

    let both = with(&f, &[B, A]).await.unwrap();
    let mut seen = BTreeMap::new();
    for _ in 0..2 {
        let job = claim(&both).await;
        assert_eq!(job.confidential.as_ref().unwrap().secrets.len(), 2, "the new one and the retired one, which is not encrypted");
        assert_eq!(job.confidential.as_ref().unwrap().secrets[0], secret);
        seen.insert(job.request.id, token(&job).to_owned());
        f.run("update receivers set probe_at = now()").await;
    }
    assert_eq!(seen, [(plain, "stored-before".to_owned()), (sealed, "stored-with-a".to_owned())].into());
}

#[tokio::test]
async fn a_process_without_a_key_that_is_needed_or_with_another_one_says_so_when_it_starts() {
    let f = Fixture::new().await;
    with(&f, &[]).await.unwrap();
    with(&f, &[A]).await.unwrap();
    with(&f, &[B, A]).await.unwrap();
    assert_eq!(error(with(&f, &[]).await), EncryptionError::MissingKey("a".to_owned()));
    assert_eq!(error(with(&f, &[B]).await), EncryptionError::MissingKey("a".to_owned()));
    assert_eq!(error(with(&f, &[B, OTHER_A]).await), EncryptionError::OtherKey("a".to_owned()));
    let line = with(&f, &[B]).await.unwrap_err();
    assert_eq!(line.variable(), Some("ENCRYPTION_KEY"));
    assert_eq!(line.to_string().lines().count(), 1);
}

#[tokio::test]
async fn once_everything_is_encrypted_again_the_old_key_is_not_needed_any_more() {
    let f = Fixture::new().await;
    f.signed("a").await;
    let a = with(&f, &[A]).await.unwrap();
    let sealed = id(&a.accept(&[request(&f, "needs-a", None)], u64::MAX).await.unwrap()[0]);
    a.create_key("new", &ApiKey::generate(), &[Scope::Sign], &WebhookSecret::generate(), None).await.unwrap();
    let both = with(&f, &[B, A]).await.unwrap();
    let done = both.reencrypt().await.unwrap();
    assert_eq!((done.secrets, done.needed), (2, vec![("a".to_owned(), 1)]), "a request's headers still need it");
    assert_eq!(error(with(&f, &[B]).await), EncryptionError::MissingKey("a".to_owned()));
    f.run(&format!("delete from jobs where request_id = '{sealed}'; delete from requests where id = '{sealed}'")).await;
    assert_eq!(both.reencrypt().await.unwrap().needed, []);
    with(&f, &[B]).await.unwrap();
}

#[tokio::test]
async fn a_secret_that_cannot_be_read_holds_up_its_own_webhook_and_no_other() {
    let f = Fixture::new().await;
    f.signed("a").await;
    let a = with(&f, &[A]).await.unwrap();
    let one = id(&a.accept(&[request(&f, "one", None)], u64::MAX).await.unwrap()[0]);
    let two = id(&a.accept(&[request(&f, "two", None)], u64::MAX).await.unwrap()[0]);
    // One request's headers are moved to another request.
    f.run(&format!(
        "update requests set sealed_webhook_headers = (select sealed_webhook_headers from requests where id = '{one}') where id = '{two}'"
    ))
    .await;
    f.run(
        "insert into receivers (receiver, failures, failing_since)
        select distinct receiver, 0, null::timestamptz from jobs where kind = 'webhook'",
    )
    .await;
    let jobs = a.claim_webhook_jobs(&any_receiver(10), None, LEASE).await.unwrap().0.jobs;
    let of = |id| jobs.iter().find(|job| job.request.id == id).unwrap();
    assert_eq!(token(of(one)), "one");
    assert_eq!(of(two).confidential.as_ref().unwrap_err(), &EncryptionError::Forged("a".to_owned()));
}

#[tokio::test]
async fn a_repeated_request_is_recognised_through_a_rotation_and_its_digest_is_no_oracle() {
    let f = Fixture::new().await;
    let plain = f.accept(request(&f, "1234", Some("before"))).await.id;
    let digest = |request: uuid::Uuid| {
        format!("select ('x' || encode(substring(payload_digest for 7), 'hex'))::bit(56)::bigint from requests where id = '{request}'")
    };
    let a = with(&f, &[A]).await.unwrap();
    assert_eq!(id(&a.accept(&[request(&f, "1234", Some("before"))], u64::MAX).await.unwrap()[0]), plain);
    let keyed = id(&a.accept(&[request(&f, "1234", Some("with a"))], u64::MAX).await.unwrap()[0]);
    assert_ne!(f.number(&digest(plain)).await, f.number(&digest(keyed)).await, "the same payload, and nobody without the key can see it");
    let both = with(&f, &[B, A]).await.unwrap();
    assert_eq!(id(&both.accept(&[request(&f, "1234", Some("with a"))], u64::MAX).await.unwrap()[0]), keyed);
    assert_eq!(id(&both.accept(&[request(&f, "1234", Some("before"))], u64::MAX).await.unwrap()[0]), plain);
    for key in ["before", "with a"] {
        assert_eq!(both.accept(&[request(&f, "4321", Some(key))], u64::MAX).await.unwrap(), [Err(Rejection::Mismatch)]);
    }
}

#[tokio::test]
async fn the_bootstrap_key_keeps_its_row_and_its_secret_opens_there() {
    let f = Fixture::new().await;
    let a = with(&f, &[A]).await.unwrap();
    let (key, first, second) = (ApiKey::generate(), WebhookSecret::generate(), WebhookSecret::generate());
    let starts = futures_util::future::join_all((0..4).map(|_| a.bootstrap_key(&key, Some(&first)))).await;
    assert!(starts.into_iter().all(|made| made.unwrap() == Bootstrapped::Exists));
    assert_eq!(a.bootstrap_key(&key, Some(&second)).await.unwrap(), Bootstrapped::Exists);
    f.run("update api_keys set expires_at = now() where name = 'bootstrap'").await;
    assert_eq!(a.bootstrap_key(&key, None).await.unwrap(), Bootstrapped::Exists);
    let owner = a.callers(&[key.digest()]).await.unwrap().remove(0).unwrap().key;
    f.signed("a").await;
    a.accept(&[NewRequest { key: owner, ..request(&f, "x", None) }], u64::MAX).await.unwrap();
    assert_eq!(claim(&a).await.confidential.unwrap().secrets, [second]);
}

#[tokio::test]
async fn secrets_rotated_twice_at_once_all_sign_until_their_grace_ends_and_then_go() {
    let f = Fixture::new().await;
    f.signed("a").await;
    let secrets: Vec<WebhookSecret> = (0..3).map(|_| WebhookSecret::generate()).collect();
    let grace = Duration::from_hours(1);
    let rotations = secrets.iter().map(|secret| f.store.rotate_webhook_secret("test", secret, grace));
    assert!(futures_util::future::join_all(rotations).await.into_iter().all(|done| done.unwrap() == Changed::Done));
    f.accept(request(&f, "x", None)).await;
    let signing = claim(&f.store).await.confidential.unwrap().secrets;
    assert!(signing.len() == 4 && secrets.iter().all(|secret| signing.contains(secret)));
    f.run("update retired_webhook_secrets set signs_until = now() - interval '1 s'").await;
    again(&f).await;
    assert_eq!(claim(&f.store).await.confidential.unwrap().secrets.len(), 1);
    f.store.delete_retired_secrets(100).await.unwrap();
    assert_eq!(f.number("select count(*) from retired_webhook_secrets").await, 0);
    assert_eq!(f.store.rotate_webhook_secret("nobody", &secrets[0], grace).await.unwrap(), Changed::NoSuchKey);
}

#[tokio::test]
async fn while_a_secret_is_replaced_requests_are_accepted() {
    use sqlx::Connection;
    let f = Fixture::new().await;
    let a = with(&f, &[A]).await.unwrap();
    // Both block where they write the row that they already hold.
    f.run(
        "create function wait() returns trigger language plpgsql as $$ begin perform pg_advisory_xact_lock(7); return new; end $$;
        create trigger wait before update on api_keys for each row execute function wait()",
    )
    .await;
    for rotates in [true, false] {
        let mut connection = f.connection().await;
        let mut holder = connection.begin().await.unwrap();
        sqlx::query("select pg_advisory_xact_lock(7)").execute(&mut *holder).await.unwrap();
        let replacing = async {
            if rotates {
                assert_eq!(a.rotate_webhook_secret("test", &WebhookSecret::generate(), Duration::ZERO).await.unwrap(), Changed::Done);
            } else {
                with(&f, &[B, A]).await.unwrap().reencrypt().await.unwrap();
            }
        };
        let posting = async {
            f.until_somebody_waits_for_a_lock().await;
            tokio::time::timeout(Duration::from_secs(5), f.post(&format!("posted {rotates}"))).await.expect("it waits for the key's row");
            holder.commit().await.unwrap();
        };
        tokio::join!(replacing, posting);
    }
}
