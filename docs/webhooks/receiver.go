// A receiver of webhooks for Go: go get github.com/standard-webhooks/standard-webhooks/libraries
//
// WEBHOOK_SECRET=whsec_… PORT=9200 go run receiver.go
package main

import (
	"encoding/json"
	"io"
	"log"
	"net/http"
	"os"
	"sync"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
)

type event struct {
	Type string `json:"type"`
	Data struct {
		ID string `json:"id"`
	} `json:"data"`
}

func main() {
	webhook, err := standardwebhooks.NewWebhook(os.Getenv("WEBHOOK_SECRET"))
	if err != nil {
		log.Fatal(err)
	}
	// In real life this is a table with a unique index, written in the transaction that does the work.
	var done sync.Map
	http.HandleFunc("/", func(response http.ResponseWriter, request *http.Request) {
		// The bytes as they came: parsed and printed again, they would be others, and the signature would not fit.
		body, err := io.ReadAll(http.MaxBytesReader(response, request.Body, 1<<20))
		if err != nil || webhook.Verify(body, request.Header) != nil {
			response.WriteHeader(http.StatusUnauthorized)
			return
		}
		var event event
		if json.Unmarshal(body, &event) != nil {
			response.WriteHeader(http.StatusBadRequest)
			return
		}
		if _, before := done.LoadOrStore(request.Header.Get("webhook-id"), true); !before {
			log.Println(event.Type, event.Data.ID)
		}
		// Answered before slow work, and also when it was there before: else it is sent again.
		response.WriteHeader(http.StatusNoContent)
	})
	port := os.Getenv("PORT")
	if port == "" {
		port = "9200"
	}
	log.Println("listening on", port)
	log.Fatal(http.ListenAndServe("127.0.0.1:"+port, nil))
}
