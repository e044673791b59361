//! Encryption at rest: AES-256-GCM with ring, with keys that can be rotated.
//!
//! A ciphertext is bound to its place: if somebody copies it into another row, it does not open there. Two keys are derived from each given
//! key (HKDF-SHA256), one for encryption and one for digests, so that neither use can weaken the other.
//!
//! Not protected: the messages and signatures themselves, and anything against an attacker who can run code in our processes.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use base64::{Engine, engine::general_purpose::STANDARD};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::{hkdf, hmac};
use uuid::Uuid;

use crate::secret::{Secret, random_bytes};
use crate::settings::list;

/// Where an encrypted value is stored. It can be decrypted only for this place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SealedFor<'a> {
    /// The webhook secret of an API key, in use or retired.
    WebhookSecret(Uuid),
    /// The headers of a request's webhook.
    WebhookHeaders(Uuid),
    /// The proof that a key is the one registered under this name.
    Proof(&'a str),
}

impl SealedFor<'_> {
    fn name(self) -> String {
        match self {
            Self::WebhookSecret(key) => format!("countersign/v1/webhook secret/{key}"),
            Self::WebhookHeaders(request) => format!("countersign/v1/webhook headers/{request}"),
            Self::Proof(id) => format!("countersign/v1/proof/{id}"),
        }
    }
}

/// A value as it is stored: encrypted if it names a key, plain otherwise.
#[derive(Clone, PartialEq, Eq)]
pub struct AtRest {
    /// The key that decrypts the value. `None` if the value is plain.
    pub key_id: Option<String>,
    /// The value. If encrypted: the nonce, the ciphertext and the tag.
    pub bytes: Vec<u8>,
}

impl fmt::Debug for AtRest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[stored under {:?}]", self.key_id)
    }
}

/// Why a stored value can't be read. Each error is one line that says what helps.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncryptionError {
    /// The key is not among the given ones.
    #[error("the key `{0}` is missing, and stored secrets need it; add it after the first one, as `{0}:BASE64`")]
    MissingKey(String),
    /// Another key has this name now.
    #[error("the key `{0}` is not the one that stored secrets were encrypted with; give that one, and a new one under a new name")]
    OtherKey(String),
    /// The value was changed, or is in the wrong place.
    #[error("a stored secret does not open with the key `{0}`: it was changed, or moved from another row")]
    Forged(String),
    /// The value can be decrypted, but is not what was written.
    #[error("a stored secret opens, but is not what was written: somebody changed it by hand")]
    Malformed,
}

struct Key {
    id: String,
    cipher: LessSafeKey,
    digests: hmac::Key,
}

/// The keys of `ENCRYPTION_KEY`. The first one encrypts, all of them decrypt. Without a key, values are stored plain. Clones share the
/// keys.
#[derive(Clone, Default)]
pub struct Keyring(Arc<[Key]>);

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|key| &key.id)).finish()
    }
}

const ACCEPTED: &str = "NAME:BASE64 with 1 to 32 letters, digits, - or _ and the base64 of 32 bytes (`openssl rand -base64 32`); \
    several with commas between: the first one encrypts, all decrypt";

impl FromStr for Keyring {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let keys = list(text, parse_key, ACCEPTED)?;
        let twice = keys.iter().enumerate().any(|(index, key)| keys[..index].iter().any(|other| other.id == key.id));
        if twice { Err("accepted: each name once".to_owned()) } else { Ok(Self(keys.into())) }
    }
}

fn parse_key(item: &str) -> Option<Key> {
    let (id, encoded) = item.split_once(':')?;
    let named = (1..=32).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
    let bytes = STANDARD.decode(encoded.trim()).ok().filter(|bytes| named && bytes.len() == 32)?;
    let root = hkdf::Salt::new(hkdf::HKDF_SHA256, b"countersign").extract(&bytes);
    let cipher = root.expand(&[b"encryption at rest"], &AES_256_GCM).ok().map(UnboundKey::from)?;
    let digests = root.expand(&[b"payload digests"], hkdf::HKDF_SHA256).ok()?;
    Some(Key { id: id.to_owned(), cipher: LessSafeKey::new(cipher), digests: hmac_key(digests)? })
}

fn hmac_key(material: hkdf::Okm<'_, hkdf::Algorithm>) -> Option<hmac::Key> {
    let mut bytes = [0; 32];
    material.fill(&mut bytes).ok()?;
    Some(hmac::Key::new(hmac::HMAC_SHA256, &bytes))
}

impl Keyring {
    /// The name of the key that encrypts. `None` if values are stored plain.
    #[must_use]
    pub fn first(&self) -> Option<&str> {
        self.0.first().map(|key| key.id.as_str())
    }

    /// Encrypts `plain` for `place` with the first key, or returns it unencrypted if there is no key.
    ///
    /// The nonce is random, so one key should not encrypt more than 2³² values.
    ///
    /// # Panics
    /// If the operating system can't provide random bytes.
    #[must_use]
    pub fn seal(&self, place: SealedFor<'_>, plain: &[u8]) -> AtRest {
        let Some(key) = self.0.first() else { return AtRest { key_id: None, bytes: plain.to_vec() } };
        let nonce = random_bytes::<NONCE_LEN>();
        let mut ciphertext = plain.to_vec();
        let sealed = key.cipher.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(place.name()), &mut ciphertext);
        sealed.expect("what is encrypted is far below the limit of 64 GiB");
        AtRest { key_id: Some(key.id.clone()), bytes: [nonce.as_slice(), &ciphertext].concat() }
    }

    /// Decrypts the value that was stored at `place`.
    ///
    /// # Errors
    /// If the key is missing, or the value is not what was stored there.
    pub fn open(&self, place: SealedFor<'_>, stored: AtRest) -> Result<Secret<Vec<u8>>, EncryptionError> {
        let Some(id) = stored.key_id else { return Ok(Secret::new(stored.bytes)) };
        let Some(key) = self.0.iter().find(|key| key.id == id) else { return Err(EncryptionError::MissingKey(id)) };
        let opened = stored.bytes.split_at_checked(NONCE_LEN).and_then(|(nonce, ciphertext)| {
            let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
            let mut buffer = ciphertext.to_vec();
            let plain = key.cipher.open_in_place(nonce, Aad::from(place.name()), &mut buffer).ok()?;
            Some(Secret::new(plain.to_vec()))
        });
        opened.ok_or(EncryptionError::Forged(id))
    }

    /// The digests that may have been stored for `secret`.
    ///
    /// The first is the one to store, the others are from older keys, and the last is from before there was a key. A keyed digest is of no
    /// use to an attacker who has only the database and tries out candidates for the secret.
    #[must_use]
    pub fn digests(&self, secret: &[u8; 32]) -> Vec<[u8; 32]> {
        let keyed = self.0.iter().map(|key| {
            let mut digest = [0; 32];
            digest.copy_from_slice(hmac::sign(&key.digests, secret).as_ref());
            digest
        });
        keyed.chain([*secret]).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(id: &str, byte: u8) -> String {
        format!("{id}:{}", STANDARD.encode([byte; 32]))
    }

    fn ring(items: &[String]) -> Keyring {
        items.join(",").parse().unwrap()
    }

    const PLACE: SealedFor<'static> = SealedFor::WebhookSecret(Uuid::from_u128(1));

    #[test]
    fn the_first_key_encrypts_and_all_decrypt() {
        let old = ring(&[key("a", 1)]).seal(PLACE, b"secret");
        let both = ring(&[key("b", 2), key("a", 1)]);
        assert_eq!(both.open(PLACE, old).unwrap().expose(), b"secret");
        let new = both.seal(PLACE, b"secret");
        assert_eq!(new.key_id.as_deref(), Some("b"));
        assert_eq!(ring(&[key("a", 1)]).open(PLACE, new).unwrap_err(), EncryptionError::MissingKey("b".to_owned()));
    }

    #[test]
    fn what_was_stored_before_there_was_a_key_stays_readable() {
        let plain = Keyring::default().seal(PLACE, b"secret");
        assert_eq!((plain.key_id.as_deref(), plain.bytes.as_slice()), (None, b"secret".as_slice()));
        assert_eq!(ring(&[key("a", 1)]).open(PLACE, plain).unwrap().expose(), b"secret");
    }

    #[test]
    fn a_ciphertext_opens_only_in_its_place_with_its_key_and_unchanged() {
        let ring_a = ring(&[key("a", 1)]);
        let sealed = ring_a.seal(PLACE, b"secret");
        for place in [SealedFor::WebhookSecret(Uuid::from_u128(2)), SealedFor::WebhookHeaders(Uuid::from_u128(1)), SealedFor::Proof("a")] {
            assert_eq!(ring_a.open(place, sealed.clone()).unwrap_err(), EncryptionError::Forged("a".to_owned()));
        }
        assert!(ring(&[key("a", 9)]).open(PLACE, sealed.clone()).is_err());
        for index in 0..sealed.bytes.len() {
            let mut changed = sealed.clone();
            changed.bytes[index] ^= 1;
            assert!(ring_a.open(PLACE, changed).is_err(), "byte {index}");
        }
        for length in 0..sealed.bytes.len() {
            assert!(ring_a.open(PLACE, AtRest { bytes: sealed.bytes[..length].to_vec(), ..sealed.clone() }).is_err());
        }
    }

    #[test]
    fn digests_differ_by_key_and_the_plain_one_is_last() {
        let digests = ring(&[key("a", 1), key("b", 2)]).digests(&[7; 32]);
        assert_eq!((digests.len(), digests[2]), (3, [7; 32]));
        assert!(digests[0] != digests[1] && digests[0] != digests[2]);
        assert_eq!(ring(&[key("b", 2)]).digests(&[7; 32])[0], digests[1]);
    }

    #[test]
    fn keys_that_are_no_keys_are_refused_and_none_is_ever_printed() {
        let [long, short] = [format!("{}:{}", "x".repeat(33), STANDARD.encode([1; 32])), format!("a:{}", STANDARD.encode([1; 31]))];
        for text in ["a", "a:", ":", "a:!!", &key("", 1), &key("a b", 1), &long, &short, &format!("{},{}", key("a", 1), key("a", 2))] {
            assert!(text.parse::<Keyring>().unwrap_err().starts_with("accepted: "), "{text}");
        }
        assert_eq!(format!("{:?}", ring(&[key("a", 1)])), "[\"a\"]");
        assert!("".parse::<Keyring>().unwrap().first().is_none());
    }

    proptest! {
        #[test]
        fn what_is_sealed_opens_and_shows_nothing_of_it(plain in proptest::collection::vec(any::<u8>(), 16..200)) {
            let ring = ring(&[key("a", 3)]);
            let sealed = ring.seal(PLACE, &plain);
            prop_assert!(!sealed.bytes.windows(16).any(|window| window == &plain[..16]));
            prop_assert_ne!(&ring.seal(PLACE, &plain).bytes, &sealed.bytes);
            let opened = ring.open(PLACE, sealed).unwrap();
            prop_assert_eq!(opened.expose(), &plain);
        }
    }
}
