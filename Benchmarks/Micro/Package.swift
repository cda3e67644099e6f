// swift-tools-version: 6.2
import PackageDescription

// A package of its own, so that packages which depend on swimg do not fetch a benchmark library.
let package = Package(
    name: "Micro",
    dependencies: [
        .package(name: "swimg", path: "../.."),
        // Without its default traits, because jemalloc would replace the allocator to measure.
        .package(url: "https://github.com/ordo-one/benchmark", from: "1.38.1", traits: []),
    ],
    targets: [
        .executableTarget(
            name: "Stages",
            dependencies: [
                .product(name: "Benchmark", package: "benchmark"),
                .product(name: "ImageConvert", package: "swimg"),
            ],
            path: "Benchmarks/Stages",
            swiftSettings: [.swiftLanguageMode(.v6), .enableExperimentalFeature("Lifetimes")],
            plugins: [.plugin(name: "BenchmarkPlugin", package: "benchmark")])
    ]
)
