//! Item vectors from attributes: their gradients, items that training has not seen, and the
//! catalogue file.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use bireme::checkpoint::Checkpoints;
use bireme::collective::phase_timer::PhaseTimer;
use bireme::config::{Config, ContentConfig};
use bireme::data::{Batch, Days, Segment, with_seed};
use bireme::model::head::{Logits, NegativeSampler, Negatives, uniform_numbers};
use bireme::model::{
    GruConfig, HeadConfig, InputConfig, LossConfig, Network, NoHooks, Recommender,
};
use parquet::data_type::{DoubleType, FloatType, Int32Type, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use tch::{Device, Kind, Tensor};

use crate::support::configs::REPRODUCIBLE;
use crate::support::one_day::{N_ITEMS, OneDay};
use crate::support::session_data::{self, COLOUR, ITEM, PRICE, colour};
use crate::support::session_shop::SessionShop;
use crate::support::tensors::distance;

/// Writes a catalogue of these items: colours as i32, prices as f64.
fn write_catalogue(path: &Path, items: &[i32]) {
    let message = format!(
        "message items {{ required int32 {ITEM}; optional int32 {COLOUR}; required double {PRICE}; \
         required int32 unknown; }}"
    );
    let schema = Arc::new(parse_message_type(&message).unwrap());
    let properties = Arc::new(WriterProperties::builder().build());
    let mut writer =
        SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
    // Two row groups.
    for items in items.chunks(items.len().div_ceil(2)) {
        let mut columns = writer.next_row_group().unwrap();
        let colours: Vec<i32> = items.iter().map(|&item| colour(item.into()) as i32).collect();
        let prices: Vec<f64> = items.iter().map(|&item| f64::from(item) / 40.0).collect();
        let mut column = columns.next_column().unwrap().unwrap();
        column.typed::<Int32Type>().write_batch(items, None, None).unwrap();
        column.close().unwrap();
        let mut column = columns.next_column().unwrap().unwrap();
        let defined = vec![1; colours.len()];
        column.typed::<Int32Type>().write_batch(&colours, Some(&defined), None).unwrap();
        column.close().unwrap();
        let mut column = columns.next_column().unwrap().unwrap();
        column.typed::<DoubleType>().write_batch(&prices, None, None).unwrap();
        column.close().unwrap();
        let mut column = columns.next_column().unwrap().unwrap();
        column.typed::<Int32Type>().write_batch(items, None, None).unwrap();
        column.close().unwrap();
        columns.close().unwrap();
    }
    writer.close().unwrap();
}

/// A day of sessions.
fn one_day() -> OneDay {
    OneDay::new(&session_data::sessions(60, N_ITEMS, 5))
}

fn batch(shop: &OneDay) -> Batch {
    let sessions = shop.sessions();
    let rows: Vec<_> = (0..sessions.len()).map(|row| (&sessions, row)).collect();
    Batch::new(&rows, shop.features())
}

fn with_content(shop: &OneDay, id_dropout: f64, cosine: bool) -> Network<'static> {
    let content = ContentConfig { id_dropout, n_buckets: 3, ..ContentConfig::default() };
    let config = GruConfig {
        hidden_width: 12,
        dropout: 0.0,
        input: InputConfig { item_width: 8, content: Some(content), ..InputConfig::default() },
        head: HeadConfig { cosine, temperature: 0.3, ..HeadConfig::default() },
        ..GruConfig::default()
    };
    shop.gru(&config)
}

#[test]
fn vectors_of_ids_and_attributes_learn_along_their_gradients() {
    let shop = one_day();
    let batch = batch(&shop);
    let logits = Logits { kind: Kind::Float, most: 1 << 20 };
    let loss = LossConfig::Sampled {
        n_negatives: 12,
        power: 0.5,
        uniform_share: 0.0,
        label_smoothing: 0.0,
        in_batch: true,
    };
    let sampler = NegativeSampler::new(loss, &[3; N_ITEMS as usize], logits, Device::Cpu);
    for (id_dropout, cosine, negatives) in [
        (0.0, false, Negatives::Full { label_smoothing: 0.1, logits }),
        (0.4, false, Negatives::Full { label_smoothing: 0.0, logits }),
        (0.4, false, sampler.negatives(&uniform_numbers(sampler.n_sampled(), 7))),
        (0.0, true, Negatives::Full { label_smoothing: 0.1, logits }),
        (0.4, true, sampler.negatives(&uniform_numbers(sampler.n_sampled(), 7))),
    ] {
        let mut network = with_content(&shop, id_dropout, cosine);
        let values = network.parameters().values();
        let noise = tch::no_grad(|| with_seed(5, || values.randn_like() * 0.2));
        let start = network.parameters().values() + noise;
        let loss = |network: &mut Network, values: &Tensor| {
            tch::no_grad(|| network.parameters().values().copy_(values));
            network.gradients_mut().zero();
            let prepared = network.preparer().prepare(&batch, None);
            let sum = network.backward(&prepared, &negatives, &mut NoHooks, &mut PhaseTimer::off());
            network.finish_gradients(&Tensor::from(batch.step_seed as i64)).unwrap();
            sum.unwrap().loss.double_value(&[])
        };
        loss(&mut network, &start);
        let gradient = network.gradients().all().copy();
        let named = network.parameters().named(&gradient);
        let is_checked = |name: &str| {
            ["content.", "item_table", "head.log_scale"].iter().any(|of| name.starts_with(of))
        };
        let named: Vec<_> = named.iter().filter(|(name, _)| is_checked(name)).collect();
        assert_eq!(named.len(), 4 + usize::from(cosine));
        for (name, of_name) in named {
            let norm = of_name.norm().double_value(&[]);
            let mask = gradient.zeros_like();
            let parts = network.parameters().named(&mask);
            let (_, part) = parts.iter().find(|(other, _)| other == name).unwrap();
            part.shallow_clone().copy_(of_name);
            let step = mask * (0.02 / norm);
            let change =
                loss(&mut network, &(&start + &step)) - loss(&mut network, &(&start - &step));
            let expected = 2.0 * 0.02 * norm;
            assert!((change - expected).abs() < 0.02 * expected, "{name}: {change} {expected}");
        }
        // An id that the step left out has no gradient, but was part of the loss.
        let n_zero = named_rows(&network, "item_table.weight").eq(0.0).sum(Kind::Int64);
        let share = n_zero.int64_value(&[]) as f64 / N_ITEMS as f64;
        assert!((share - id_dropout).abs() < 0.25, "{id_dropout}: {share}");
    }
}

/// Norm of the gradient of each row of a table.
fn named_rows(network: &Network, name: &str) -> Tensor {
    let named = network.parameters().named(&network.gradients().all());
    let (_, table) = named.into_iter().find(|(other, _)| other == name).unwrap();
    table.norm_scalaropt_dim(2.0, [1i64].as_slice(), false)
}

#[test]
fn served_scores_are_those_of_the_composed_vectors() {
    for cosine in [false, true] {
        assert_served_as_composed(cosine);
    }
}

fn assert_served_as_composed(cosine: bool) {
    let shop = one_day();
    let mut network = with_content(&shop, 0.2, cosine);
    tch::no_grad(|| {
        let values = network.parameters().values();
        values.shallow_clone().copy_(&(&values + values.randn_like() * 0.1));
    });
    let batch = batch(&shop);
    let scores = |network: &Network| network.scores(&network.encode(&batch).unwrap(), 0..N_ITEMS);
    let expected = scores(&network);
    // A checkpoint restores the attributes with the weights.
    let mut restored = with_content(&shop, 0.2, cosine);
    restored.load_weights(&network.weights()).unwrap();
    assert!(distance(&scores(&restored), &expected) < 1e-6);
    network.serve_with_tables_in(Kind::Float);
    assert!(distance(&scores(&network), &expected) < 1e-5);
}

/// Sessions within one colour each, in which items of `unseen` do not occur.
fn sessions_by_colour(n_sessions: usize, seed: u64, unseen: &[i64]) -> Vec<Vec<i64>> {
    let mut number = session_data::numbers(seed);
    let session = |_| {
        let of_session = 1 + number(7) as i64;
        let items: Vec<i64> = (2..N_ITEMS)
            .filter(|item| colour(*item) == of_session && !unseen.contains(item))
            .collect();
        (0..4).map(|_| items[number(items.len() as u64) as usize]).collect()
    };
    (0..n_sessions).map(session).collect()
}

/// The network of a run's newest checkpoint.
fn trained(shop: &SessionShop, run: &str) -> Network<'static> {
    let config = Config::load(&shop.run_dir(run).join("config.toml"), &[]).unwrap();
    let days = Days::open(&shop.data(), &config.data).unwrap();
    let neural = config.model.neural().unwrap();
    let mut network = Network::new(&neural, days.features(), 20, 0, Device::Cpu).unwrap();
    let tensors = Checkpoints::of(&shop.run_dir(run)).newest().unwrap().0.tensors;
    network.load_weights(&tensors.weights).unwrap();
    network
}

/// Sessions of one event each: items and their colours.
fn sessions_of_one(items: &[i64]) -> Batch {
    let colours: Vec<i64> = items.iter().map(|&item| colour(item)).collect();
    Batch {
        columns: vec![Tensor::from_slice(items), Tensor::from_slice(&colours)],
        lengths: vec![1; items.len()],
        session_seeds: vec![0; items.len()],
        days: vec![1; items.len()],
        step_seed: 0,
        segments: vec![Segment { seed: 0, n_sessions: items.len() }],
    }
}

#[test]
fn items_that_training_has_not_seen_are_scored_by_their_attributes() {
    let shop = SessionShop::new(10);
    let unseen = [8, 17, 26];
    for day in 1..=3 {
        let sessions = sessions_by_colour(300, day, &unseen);
        for split in ["train", "valid", "test"] {
            let path = shop.data().join(format!("{day}/{split}.parquet"));
            session_data::write_sessions(&path, &sessions, |item| item as f32 / 40.0);
        }
    }
    let features = format!("data.features=[\"{COLOUR}\"]");
    let set = ["--set", &features, "--set", "train.epochs_per_day=4"];
    let content = ["--set", "model.input.content={ id_dropout = 0.2 }"];
    let set = [&set[..], &content, &["--set", "train.learning_rate=0.02"]].concat();
    // After an item of its colour, how many of the unseen items are above an unseen one.
    let ranks = |run: &str| {
        let (network, known) = (trained(&shop, run), unseen.map(|item| item % 7 + 7));
        let scores = network.scores(&network.encode(&sessions_of_one(&known)).unwrap(), 0..N_ITEMS);
        let above = |(row, item): (i64, &i64)| {
            let of = |item: i64| scores.double_value(&[row, item]);
            unseen.iter().filter(|other| of(**other) > of(*item)).count()
        };
        (0..).zip(&unseen).map(above).collect::<Vec<_>>()
    };
    // Without the catalogue all unseen items have the same vector.
    shop.train("blind", &set).success();
    assert_ne!(ranks("blind"), [0, 0, 0]);
    write_catalogue(&shop.data().join("items.parquet"), &[8, 17, 26]);
    shop.train("catalogue", &set).success();
    assert_eq!(ranks("catalogue"), [0, 0, 0]);
}

/// Writes a file whose items are numbers with fractions.
fn write_fractional_items(path: &Path) {
    let schema = parse_message_type(&format!("message items {{ required double {ITEM}; }}"));
    let properties = Arc::new(WriterProperties::builder().build());
    let file = File::create(path).unwrap();
    let mut writer =
        SerializedFileWriter::new(file, Arc::new(schema.unwrap()), properties).unwrap();
    let mut columns = writer.next_row_group().unwrap();
    let mut column = columns.next_column().unwrap().unwrap();
    column.typed::<DoubleType>().write_batch(&[2.0, 3.0], None, None).unwrap();
    column.close().unwrap();
    columns.close().unwrap();
    writer.close().unwrap();
}

#[test]
fn a_bad_catalogue_is_refused() {
    let shop = SessionShop::new(20);
    let features = format!("data.features=[\"{COLOUR}\"]");
    let set = ["--set", &features, "--set", "model.input.content={}"];
    let path = shop.data().join("items.parquet");
    let refused = |message: &str| {
        let finished = shop.train("refused", &set);
        assert_eq!(finished.code, Some(2), "{finished:#?}");
        let message = format!("`{}`{message}", path.display());
        assert!(finished.stderr.contains(&message), "{message}\n{finished:#?}");
        assert!(!shop.run_dir("refused").exists());
    };
    write_catalogue(&path, &[3, 4, 3]);
    refused(" row 2: column `product_id-list_seq` holds the item 3 a second time");
    write_catalogue(&path, &[3, 4, 40]);
    refused(" row 2: column `product_id-list_seq` has the id 40, outside 1..=39 of the schema");
    write_fractional_items(&path);
    refused(": column `product_id-list_seq` has the unexpected type DOUBLE");
    fs::write(&path, "no parquet").unwrap();
    refused("");
    session_data::write_sessions(&path, &[vec![2, 3]], |_| 0.0);
    refused("");
    let untied = [&set[..], &["--set", "model.head.tied=false"]].concat();
    let finished = shop.train("refused", &untied);
    assert!(finished.stderr.contains("`input.content` needs `head.tied`"), "{finished:#?}");
}

/// Writes vectors of these items, `width(item)` numbers each.
fn write_vectors(path: &Path, items: &[i64], width: impl Fn(i64) -> usize) {
    let message = format!(
        "message vectors {{ required int64 {ITEM}; required group vector (LIST) {{ repeated group \
         list {{ required float element; }} }} }}"
    );
    let schema = Arc::new(parse_message_type(&message).unwrap());
    let properties = Arc::new(WriterProperties::builder().build());
    let mut writer =
        SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
    let mut columns = writer.next_row_group().unwrap();
    let mut column = columns.next_column().unwrap().unwrap();
    column.typed::<Int64Type>().write_batch(items, None, None).unwrap();
    column.close().unwrap();
    let numbers = |item: i64| (0..width(item)).map(move |i| (item * 7 + i as i64 * 3) as f32 % 5.0);
    let values: Vec<f32> = items.iter().flat_map(|&item| numbers(item)).collect();
    let repetitions: Vec<i16> =
        items.iter().flat_map(|&item| (0..width(item)).map(|i| i16::from(i > 0))).collect();
    let mut column = columns.next_column().unwrap().unwrap();
    let definitions = vec![1; values.len()];
    column
        .typed::<FloatType>()
        .write_batch(&values, Some(&definitions), Some(&repetitions))
        .unwrap();
    column.close().unwrap();
    columns.close().unwrap();
    writer.close().unwrap();
}

/// The item table of a run's newest checkpoint.
fn item_vectors(shop: &SessionShop, run: &str) -> Tensor {
    let tensors = Checkpoints::of(&shop.run_dir(run)).newest().unwrap().0.tensors;
    let table = tensors.weights.into_iter().find(|(name, _)| name == "item_table.weight");
    table.unwrap().1
}

#[test]
fn item_vectors_begin_as_those_of_a_file_and_stay_if_they_are_frozen() {
    let shop = SessionShop::new(100);
    let path = shop.data().join("vectors.parquet");
    let items: Vec<i64> = (2..30).collect();
    write_vectors(&path, &items, |_| 6);
    let start = |frozen: bool| {
        let path = path.display();
        format!("model.input.start={{ kind = \"file\", path = \"{path}\", frozen = {frozen} }}")
    };
    let set = ["--set", "model.input.item_width=8", "--set", "model.input.init_std=0.1"];
    let unlearnt = [&set[..], &["--set", "train.learning_rate=0.0"]].concat();
    shop.train("unlearnt", &[&unlearnt[..], &["--set", &start(false)]].concat()).success();
    let of_file = item_vectors(&shop, "unlearnt").narrow(0, 2, 28);
    let square = of_file.square().mean(Kind::Double).double_value(&[]);
    assert!((square.sqrt() - 0.1 * (6.0_f64 / 8.0).sqrt()).abs() < 2e-2, "{square}");
    assert_eq!(of_file.narrow(1, 6, 2).abs().max().double_value(&[]), 0.0);

    let [start_frozen, start_learnt] = [true, false].map(start);
    let frozen = [&set[..], &["--set", &start_frozen]].concat();
    let learnt = [&set[..], &["--set", &start_learnt]].concat();
    for (run, more, stays) in [("frozen", &frozen, true), ("learnt", &learnt, false)] {
        shop.train(run, more).success();
        let vectors = item_vectors(&shop, run);
        assert_eq!(vectors.narrow(0, 2, 28).equal(&of_file), stays, "{run}");
        // Items without a vector learn.
        assert!(
            !vectors.narrow(0, 30, 10).equal(&item_vectors(&shop, "unlearnt").narrow(0, 30, 10))
        );
    }
    // On three ranks and a sharded table, and after an interruption, too.
    let sharded = [&frozen[..], &REPRODUCIBLE, &["--set", "parallel.item_table=sharded"]].concat();
    if let Some(finished) = shop.train_on(3, "sharded", &sharded) {
        finished.success();
        shop.train("alone", &sharded).success();
        assert!(item_vectors(&shop, "sharded").equal(&item_vectors(&shop, "alone")));
        assert!(item_vectors(&shop, "sharded").narrow(0, 2, 28).equal(&of_file));
    }
    let saved = [&frozen[..], &["--set", "checkpoint.every_steps=1"]].concat();
    let killed = shop.train_command("stopped", &saved).env("BIREME_FAULT", "kill@0:4").output();
    assert!(!killed.unwrap().status.success());
    let resumed = shop.train("stopped", &saved).success();
    assert!(resumed.stderr.contains("resuming from"), "{resumed:#?}");
    assert!(item_vectors(&shop, "stopped").narrow(0, 2, 28).equal(&of_file));

    let refused = |message: &str| {
        let finished = shop.train("refused", &learnt);
        assert_eq!(finished.code, Some(2), "{finished:#?}");
        assert!(finished.stderr.contains(message), "{message}\n{finished:#?}");
        assert!(!shop.run_dir("refused").exists());
    };
    write_vectors(&path, &[2, 3, 4], |item| if item == 4 { 5 } else { 6 });
    refused("vectors.parquet` row 2: column `vector` has 5 values, the first vector 6");
    write_vectors(&path, &[2, 3, 2], |_| 6);
    refused("vectors.parquet` row 2: column `product_id-list_seq` holds the item 2 a second time");
    write_catalogue(&path, &[2, 3]);
    refused("vectors.parquet`: column `vector` is missing");
    write_fractional_items(&path);
    refused("vectors.parquet`: column `product_id-list_seq` has the unexpected type DOUBLE");
    fs::remove_file(&path).unwrap();
    refused("vectors.parquet`");
}

#[test]
fn item_vectors_begin_as_factors_of_the_counts_on_any_number_of_ranks() {
    let shop = SessionShop::new(150);
    let start = ["--set", "model.input.start={ kind = \"pair_counts\" }"];
    let set = [&start[..], &REPRODUCIBLE, &["--set", "train.learning_rate=0.0"]].concat();
    shop.train("alone", &set).success();
    let vectors = item_vectors(&shop, "alone");
    // An item is mostly followed by the next one.
    let products = vectors.matmul(&vectors.tr());
    let mean_of = |distance: i64| {
        products.diagonal(distance, 0, 1).narrow(0, 2, 20).mean(Kind::Double).double_value(&[])
    };
    assert!(mean_of(1) > 3.0 * mean_of(15).abs(), "{} {}", mean_of(1), mean_of(15));
    for layout in ["replicated", "sharded"] {
        let layout = format!("parallel.item_table={layout}");
        let set = [&set[..], &["--set", &layout]].concat();
        let Some(finished) = shop.train_on(3, &layout, &set) else { return };
        finished.success();
        assert!(item_vectors(&shop, &layout).equal(&vectors), "{layout}");
    }
}
