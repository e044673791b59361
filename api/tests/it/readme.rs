//! What the README promises exists: the tests of each guarantee, each setting of the two programs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::world::{Binary, Env, PATIENCE, spawn};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn section(readme: &str, title: &str) -> String {
    let from = readme.find(&format!("\n## {title}\n")).unwrap_or_else(|| panic!("no section {title}"));
    let text = &readme[from + 4..];
    text[..text.find("\n## ").unwrap_or(text.len())].to_owned()
}

/// The texts between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

fn sources(folder: &Path, all: &mut String) {
    for entry in folder.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, all);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            all.push_str(&std::fs::read_to_string(path).unwrap());
        }
    }
}

#[test]
fn every_guarantee_names_tests_that_exist() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let all = std::fs::read_to_string(root().join("docs/guarantees.md")).unwrap();
    let mut code = String::new();
    for folder in ["api", "devkit", "shared", "worker"] {
        sources(&root().join(folder), &mut code);
    }
    let guarantees = section(&readme, "Guarantees");
    let rows: Vec<&str> = guarantees.lines().filter(|line| line.starts_with("| ") && line.contains("**")).collect();
    assert_eq!((rows.len(), all.matches("\n## ").count()), (10, 10));
    for row in rows {
        let test = quoted(row.rsplit_once(" | ").unwrap().1).next().unwrap();
        assert!(all.contains(&format!("- `{test}`")), "{test} is in the README alone");
    }
    let tests: Vec<&str> = all.lines().filter_map(|line| quoted(line.strip_prefix("- ")?).next()).collect();
    assert!(tests.len() > 50);
    for test in tests {
        assert!(code.contains(&format!("fn {test}(")), "docs/guarantees.md names {test}, which is no test");
    }
    let migrations = root().join("migrations").read_dir().unwrap().map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap());
    code.extend(migrations);
    for document in [
        "README.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "docs/metrics.md",
        "docs/performance.md",
        "docs/performance-log.md",
        "docs/webhooks.md",
    ] {
        let text = std::fs::read_to_string(root().join(document)).unwrap();
        // A test, or the name of something else that is as long.
        let is_long = |name: &&str| name.matches('_').count() > 3 && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        for name in text.lines().flat_map(quoted).filter(is_long) {
            assert!(code.contains(name), "{document} names {name}, which is nowhere in the code");
        }
    }
}

#[test]
fn the_table_of_metrics_has_every_metric_and_no_other_and_each_is_described() {
    let mut code = String::new();
    for folder in ["api/src", "shared/src", "worker/src"] {
        sources(&root().join(folder), &mut code);
    }
    let named = |calls: &[&str]| -> BTreeSet<String> {
        let names = calls.iter().flat_map(|call| code.split(call).skip(1)).filter_map(|rest| rest.split('"').nth(1));
        names.map(ToOwned::to_owned).collect()
    };
    let used = named(&["metrics::counter!", "metrics::gauge!", "metrics::histogram!"]);
    let table = std::fs::read_to_string(root().join("docs/metrics.md")).unwrap();
    let documented: BTreeSet<String> =
        table.lines().filter(|line| line.starts_with("| `")).filter_map(|line| quoted(line).next()).map(ToOwned::to_owned).collect();
    assert!(used.len() > 10);
    assert_eq!(used, documented);
    assert_eq!(used, named(&["metrics::describe_"]));
}

#[tokio::test]
async fn the_table_of_settings_has_every_setting_and_no_other() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let is_name = |text: &&str| text.len() > 3 && text.chars().all(|c| c.is_ascii_uppercase() || c == '_');
    let settings = section(&readme, "Settings");
    let documented: BTreeSet<String> = settings
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split(" | ").next())
        .flat_map(|cell| quoted(cell).filter(is_name).map(ToOwned::to_owned).collect::<Vec<_>>())
        .collect();
    let mut offered = BTreeSet::new();
    for binary in [Binary::Api, Binary::Worker] {
        let mut help = spawn(binary, &["--help"], &Env::new()).await;
        help.wait_exit(PATIENCE).await.unwrap();
        let text = help.log();
        let names = text.split("[env: ").skip(1).map(|rest| rest.split(['=', ']', ' ']).next().unwrap());
        offered.extend(names.map(ToOwned::to_owned));
    }
    assert_eq!(documented, offered);
}
